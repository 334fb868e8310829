#!/usr/bin/env python3
"""Runs every kernel through the compilers of its targets: DXC, spirv-val, glslang and Tint. `make check-shaders` runs it.
docs/drivers.md describes what it checks and which tools it needs.

    TIEBEAM_DUMP_SHADERS=FOLDER cargo test --release --test house -- shaders::every_variant
    scripts/check-shaders.py FOLDER [--tools FOLDER] [--only dxc,spirv-val,glslang,tint] [--table docs/drivers.md]

Exits with 1 if a kernel was refused or crashed its compiler, and with 2 if the check was not complete.
"""
import argparse, json, subprocess, sys
from pathlib import Path
from check_shaders import commands, dxc, report, tint, tools
from check_shaders.common import Missing, Progress, Result


def with_dxc(folder, place, records, progress):
    library = tools.dxc(place)
    return f"DXC {dxc.version(library)}", dxc.check(library, folder, records, progress())


def with_validator(target):
    def check(folder, place, records, progress):
        program, version = tools.validator(place)
        return f"spirv-val {version}", commands.validator(program, target, folder, records, progress())

    return check


def with_glslang(folder, place, records, progress):
    program, version = tools.glslang()
    return f"glslang {version}", commands.glslang(program, folder, records, progress())


def with_tint(folder, place, records, progress):
    program, version = tools.chromium()
    results, adapter = tint.check(program, folder, records, progress())
    return f"Tint of Chromium {version}, {adapter}", results


# For each compiler: its name on the command line, the target that it represents, its input language, and the check.
COMPILERS = [
    ("dxc", "DX12, shader model 6.2", "HLSL", with_dxc),
    ("spirv-val", "Vulkan 1.1", "SPIR-V 1.3", with_validator("vulkan1.1")),
    ("spirv-val", "Vulkan 1.3", "SPIR-V 1.6", with_validator("vulkan1.3")),
    ("glslang", "OpenGL ES 3.1", "GLSL", with_glslang),
    ("tint", "WebGPU", "WGSL", with_tint),
]


def arguments():
    parser = argparse.ArgumentParser(description="Runs every kernel through the compilers of its targets.")
    parser.add_argument("folder", type=Path, help="what the test wrote: see docs/drivers.md")
    parser.add_argument("--tools", type=Path, help="where downloaded wheels are (default: beside the folder)")
    parser.add_argument("--only", default="dxc,spirv-val,glslang,tint", help="compilers, by commas")
    parser.add_argument("--table", type=Path, help="a Markdown file whose table is to be replaced")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := set(given.only) - {name for name, *_ in COMPILERS}:
        parser.error(f"there is no compiler {', '.join(sorted(unknown))}")
    return given


def main():
    given = arguments()
    manifest = given.folder / "manifest.jsonl"
    if not manifest.exists():
        print(f"check-shaders: {manifest} is not there; `make check-shaders` writes it", file=sys.stderr)
        sys.exit(2)
    with open(manifest) as file:
        manifest = [json.loads(line) for line in file]
    place = given.tools or given.folder.parent / "tools"
    rows, left_out = [], []
    for name, target, language, check in COMPILERS:
        if name not in given.only:
            left_out.append(f"{target} was left out by --only")
            continue
        records = [record for record in manifest if record["language"] == language]
        known = [Result(r, "not for", r["not_for"]) for r in records if "not_for" in r]
        known += [Result(r, "refused", r["refused"]) for r in records if "refused" in r]
        written = [record for record in records if "file" in record]
        try:
            compiler, results = check(given.folder, place, written, lambda: Progress(target, len(written)))
        except Missing as missing:
            left_out.append(f"{target} needs {missing}, which is missing here. To get it:\n    {missing.command}")
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            left_out.append(f"{target}: {error}")
        else:
            rows.append(report.Row(compiler, target, known + results))
    report.show(rows)
    if given.table and not left_out:
        report.write(rows, given.table)
    for line in left_out:
        print(f"\n{line}")
    if left_out:
        print("\nThe check was not complete.")
        sys.exit(2)
    sys.exit(any(row.bad() for row in rows))


main()
