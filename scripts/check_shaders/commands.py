"""The compilers that are commands, spirv-val and glslang. Each kernel is checked by its own process."""
import array, subprocess
from .common import Result, each, first_error

# A kernel that takes longer than this counts as crashed.
MOST_SECONDS = 120


def run(*command, given=b""):
    """Returns the exit code, or None for a command that took too long, and its output."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"took more than {MOST_SECONDS} s"
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def judged(record, code, said):
    if code is None or code < 0:
        return Result(record, "crashed", said if code is None else f"signal {-code}")
    return Result(record, "ok") if code == 0 else Result(record, "refused", first_error(said))


def glslang(program, folder, records, progress):
    return each(lambda r: judged(r, *run(program, "-S", "comp", str(folder / r["file"]))), records, progress)


# naga gives arrays in workgroup memory a stride, which only arrays in buffers may have. Every kernel with workgroup memory has
# this fault, and no change of its WGSL avoids it: https://github.com/gfx-rs/wgpu/issues/7696. The strides are removed before
# validation, so that the validator still checks the rest of such kernels.
STRIDES = "naga's strides of workgroup arrays, taken out (VUID-StandaloneSpirv-None-10684, gfx-rs/wgpu#7696)"
OP_TYPE_ARRAY, OP_TYPE_STRUCT, OP_TYPE_POINTER, OP_DECORATE = 28, 30, 32, 71
WORKGROUP, ARRAY_STRIDE = 4, 6


def without_workgroup_strides(module):
    """Returns the module without the strides of arrays in workgroup memory, and whether it had any.

    An array counts if a pointer to workgroup memory reaches it, also through structs and other arrays."""
    words = array.array("I", module)
    if words[0] != 0x07230203:
        raise ValueError("no SPIR-V of this machine's byte order")
    instructions, at = [], 5
    while at < len(words):
        count = words[at] >> 16
        instructions.append(words[at : at + count])
        at += count
    parts, reached = {}, []
    for op, *operands in ((i[0] & 0xFFFF, *i[1:]) for i in instructions):
        if op == OP_TYPE_ARRAY:
            parts[operands[0]] = operands[1:2]
        elif op == OP_TYPE_STRUCT:
            parts[operands[0]] = operands[1:]
        elif op == OP_TYPE_POINTER and operands[1] == WORKGROUP:
            reached.append(operands[2])
    for type in reached:
        reached.extend(parts.get(type, []))
    types = set(reached)
    kept = [i for i in instructions if not (i[0] & 0xFFFF == OP_DECORATE and i[1] in types and i[2] == ARRAY_STRIDE)]
    module = words[:5]
    for instruction in kept:
        module.extend(instruction)
    return module.tobytes(), len(kept) < len(instructions)


def validator(program, target, folder, records, progress):
    def check(record):
        module, stripped = without_workgroup_strides((folder / record["file"]).read_bytes())
        result = judged(record, *run(program, "--target-env", target, "-", given=module))
        return result._replace(said=STRIDES) if result.state == "ok" and stripped else result

    return each(check, records, progress)
