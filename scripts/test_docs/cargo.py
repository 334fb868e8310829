"""What the workspace has: packages, targets, features, and the names of tests."""
import json, re, subprocess
from pathlib import Path

SUBCOMMANDS = {"add", "bench", "build", "check", "clean", "clippy", "deny", "doc", "fetch", "fmt", "install", "metadata", 
               "package", "publish", "run", "rustc", "semver-checks", "test", "tree", "update"}
FLAGS = {"--release", "--locked", "--offline", "--frozen", "--all-features", "--no-default-features", "--workspace",
         "--all-targets", "--lib", "--bins", "--examples", "--tests", "--benches", "--no-run", "--no-deps", "--doc", "--open", "--dry-run", 
         "--list", "--check", "--quiet", "-q", "--verbose", "-v", "--no-fail-fast", "--force", "--allow-dirty", "--no-verify"}
# Options that take a value, by the kind of target or other thing that the value names.
VALUES = {"--example": "example", "--bin": "bin", "--test": "test", "--bench": "bench", "-p": "package", "--package": "package",
          "--features": "features", "-F": "features", "--path": "path", "--target": "", "--target-dir": "", "--crate-type": "",
          "--profile": "", "--manifest-path": "path", "-j": "", "--jobs": "", "--message-format": "", "--format-version": "",
          "--git": "", "--root": "", "--exclude": "package", "--color": "", "--version": "", "--baseline-rev": ""}
TEST_VALUES = {"--skip", "--test-threads", "--color", "--format"}
TEST_FLAGS = {"--exact", "--nocapture", "--no-capture", "--ignored", "--include-ignored", "--list", "--show-output", "--quiet"}


class Fault(Exception):
    pass


class Workspace:
    """The answer of `cargo metadata`, and the sources of tests."""

    def __init__(self, repository, metadata=None):
        self.repository = repository
        if metadata is None:
            command = ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"]
            metadata = json.loads(subprocess.run(command, cwd=repository.root, stdout=subprocess.PIPE, check=True).stdout)
        self.built = Path(metadata["target_directory"]) / "release"
        self.packages = {package["name"]: package for package in metadata["packages"]}
        default = metadata.get("workspace_default_members", [])
        self.default = [p["name"] for p in metadata["packages"] if p.get("id") in default] or list(self.packages)
        manifests = [repository.read(name) for name in repository.files if name.split("/")[-1] == "Cargo.toml"]
        own = r'\[\[(?:test|bench)\]\]\nname = "(\w+)"(?:\n(?!\[).*)*?\nharness = false'
        self.own_harness = {name for text in manifests for name in re.findall(own, text)}

    def targets(self, kind, packages):
        return {t["name"]: t for p in packages for t in self.packages[p]["targets"] if kind in t["kind"]}

    def check(self, words):
        """Checks the words after `cargo`. Returns the program that they run, if any, as (kind, name, its arguments)."""
        words = [word for word in words if not word.startswith("+")]
        command, rest = (words + [""])[0], words[1:]
        if command not in SUBCOMMANDS:
            raise Fault(f"cargo has no '{command}', or this check does not know it")
        if command == "clean":
            return None  # of any package that others depend on
        after = rest.index("--") if "--" in rest else len(rest)
        rest, arguments = rest[:after], rest[after + 1 :]
        given, free = options(rest)
        packages = [name for option, name in given if option == "package"] or list(self.packages)
        for name in packages:
            if name not in self.packages:
                raise Fault(f"there is no package {name}")
        self.features(given, packages)
        chosen = [(kind, name) for kind, name in given if kind in ("example", "bin", "test", "bench")]
        for kind, name in chosen:
            self.target(kind, name, packages, given)
        for kind, name in given:
            if kind == "path" and not re.fullmatch(r"[A-Z]+(/.*)?|/substituted.*", name) and not self.repository.has(name):
                raise Fault(f"there is no {name}")
        if command in ("add", "install"):
            for name in free:
                if name.split("@")[0].startswith("tiebeam") and name.split("@")[0] not in self.packages:
                    raise Fault(f"there is no package {name}")
        elif command in ("test", "bench"):
            self.filters(command, chosen, free, arguments)
        elif free and command != "run":
            raise Fault(f"cargo {command} takes no '{free[0]}'")
        if command == "run":
            named = any(option == "package" for option, _ in given)
            return self.program(chosen, packages if named else self.default) + (free + arguments,)
        return None

    def features(self, given, packages):
        known = {feature for name in packages for feature in self.packages[name]["features"]}
        known |= {f"{p}/{feature}" for p in self.packages for feature in self.packages[p]["features"]}
        for kind, value in given:
            for feature in re.split(r"[ ,]", value) if kind == "features" else []:
                if feature not in known:
                    raise Fault(f"there is no feature {feature}")

    def target(self, kind, name, packages, given):
        targets = self.targets(kind, packages)
        if name not in targets:
            raise Fault(f"there is no {kind} {name}")
        asked = {f for option, value in given if option == "features" for f in re.split(r"[ ,]", value)}
        lacking = set(targets[name].get("required-features", [])) - asked - self.always(packages)
        if lacking and ("", "--all-features") not in given:
            raise Fault(f"the {kind} {name} needs --features {','.join(sorted(lacking))}")

    def always(self, packages):
        """The features that packages switch on for their own examples and tests, by depending on themselves."""
        own = [d for p in packages for d in self.packages[p].get("dependencies", []) if d["name"] == p and d["kind"] == "dev"]
        return {feature for dependency in own for feature in dependency["features"]}

    def program(self, chosen, packages):
        bins = list(self.targets("bin", packages))
        if not chosen and len(bins) == 1:
            return "bin", bins[0]
        if len(chosen) != 1 or chosen[0][0] not in ("bin", "example"):
            raise Fault("cargo run needs one program")
        return chosen[0]

    def filters(self, command, chosen, free, arguments):
        """Checks that each filter fits a name, as far as the sources tell."""
        if len(free) > 1:
            raise Fault(f"cargo {command} takes one filter; more come after --")
        filters, rest, own = list(free), list(arguments), [name for _, name in chosen if name in self.own_harness]
        while rest:
            word = rest.pop(0)
            if not word.startswith("-"):
                filters.append(word)
            elif word in TEST_VALUES:
                skipped = rest.pop(0) if rest else ""
                filters += [skipped] if word == "--skip" else []
            elif command == "bench":
                text = "".join(self.repository.read(file) for _, name in chosen for file in self.sources("bench", name))
                # Benchmarks compare their arguments with a text, or have a field for each.
                if not re.search(rf'"{word}"|^    {word[2:]}: ', text, re.M):
                    raise Fault(f"the benchmark has no {word}")
                rest = rest[1:]
            elif word.partition("=")[0] not in TEST_FLAGS:
                raise Fault(f"tests have no {word}")
        if command == "test" and own and len(filters) > 1:
            raise Fault(f"the test {own[0]} takes one filter")
        kinds = chosen or [("test", name) for name in self.targets("test", self.packages)] + [("lib", "")]
        names = {name for kind, target in kinds for name in self.names(kind, target)}
        for word in filters:
            if not any(word in name for name in names) and not self.spread(word, names):
                raise Fault(f"no test or row has '{word}' in its name")

    @staticmethod
    def spread(word, names):
        """Whether every part of `a::b` is in some name: names of cases are put together when the tests run."""
        parts = [part for part in word.split("::") if part]
        return bool(parts) and all(any(part in name for name in names if "::" not in name) for part in parts)

    def sources(self, kind, target):
        folders = {"test": "tests/", "bench": "benches/", "lib": "src/", "example": "examples/"}
        places = [p + folders[kind] for p in ("", "cli/", "mpi/")] if kind in folders else ["cli/src/"]
        wanted = [place + target for place in places]
        return [f for f in self.repository.files if f.endswith(".rs") and any(
            f == w + ".rs" or f.startswith(w.rstrip("/") + "/") for w in wanted)]

    def names(self, kind, target):
        """Names of tests with their modules; where the tests name themselves, words of which names are made."""
        files = self.sources(kind, target)
        for file in files:
            inside = re.sub(r"^(?:cli/|mpi/)?\w+/", "", file[:-3])
            modules = [part for part in inside.split("/") if part not in ("main", "mod", target)]
            text = self.repository.read(file)
            inner = [""] + [m + "::" for m in re.findall(r"^\s*mod (\w+) \{", text, re.M)]
            for test in re.findall(r"#\[test\](?:\s*#\[[^\]]*\])*\s*fn (\w+)", text):
                yield from ("::".join(modules + [m + test]) for m in inner)
        if target in self.own_harness:
            cases = [f for f in self.repository.files if re.match(r"src/(ops|share)/.*\.rs$", f)] if target == "ops" else []
            for file in files + cases:
                yield file[:-3].split("/")[-1]
                yield from (s.replace(" ", "_") for s in re.findall(r'"([^"\\\n]+)"', self.repository.read(file)) if "::" not in s)
                yield from (name for name in re.findall(r"fn (\w+)", self.repository.read(file)) if file in files)
            for file in self.repository.files:
                if mark := re.match(r"tests/vectors/(\w+)/(\w+)\.safetensors", file):
                    yield f"vectors::{mark[1]}_{mark[2]}"


def options(words):
    """Pairs of what an option names and its value (flags have no kind), and the words that belong to no option."""
    given, free, words = [], [], list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in VALUES:
            if not equals and not words:
                raise Fault(f"{name} needs a value")
            given.append((VALUES[name], value if equals else words.pop(0)))
        elif word in FLAGS:
            given.append(("", word))
        elif word.startswith("-"):
            raise Fault(f"cargo has no option {word}, or this check does not know it")
        else:
            free.append(word)
    return given, free
