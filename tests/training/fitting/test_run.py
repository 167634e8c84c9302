import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from training.batch_norm import statistics
from training.fitting.recipes import RECIPES
from training.fitting.run import MOMENTS, Config, Epoch, Run, RunError
from training.model import BNLeNet, initialise, norm_layers

FIRST = Epoch(1, 2.5, 0.25, 0.5, 0.125, 1000.0, 60.0)


@pytest.fixture
def config() -> Config:
    return Config(RECIPES["best"], 3, "cpu", "torch", 500, 1, "abc", {"torch": "2.13.0"})


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Run:
    return Run.create(tmp_path / "runs" / "a", config)


def checkpoint() -> dict[str, torch.Tensor]:
    model = BNLeNet()
    initialise(model, 0)
    return dict(model.state_dict())


def test_a_configuration_comes_back_as_it_was(run: Run, config: Config) -> None:
    assert run.config() == config


def test_a_folder_that_is_not_empty_is_refused(run: Run, config: Config) -> None:
    before = (run.folder / "config.json").read_bytes()
    with pytest.raises(RunError, match="already exists: continue it with --resume"):
        Run.create(run.folder, replace(config, seed=4))
    assert (run.folder / "config.json").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the run folder .*file/a: Not a directory"):
        Run.create(tmp_path / "file" / "a", config)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"seed": 1}', '{"recipe": {"augmentation": {"x": 1}}}']
)
def test_damaged_configurations_are_refused(run: Run, text: str) -> None:
    (run.folder / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        run.config()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("batch_norm", "ours", r"batch_norm: .* 'scratch' or 'torch'"),
        ("threads", 0, "threads: .* greater than 0"),
        ("seed", "three", "seed: .* integer"),
        ("versions", ["2.13"], "versions: .* dictionary"),
        ("recipe.epochs", "many", r"recipe\.epochs: .* integer"),
        ("recipe.optimizer", "adam", r"recipe\.optimizer: .* 'sgd' or 'muon'"),
        ("recipe.finish_augmentation.shift", None, r"shift: .* number"),
        ("recipe.teachers", 3, "unexpected keyword argument 'teachers'"),
    ],
)
def test_configurations_with_other_types_are_refused(
    run: Run, place: str, value: object, message: str
) -> None:
    """As in files edited by hand; later, such a value would give an unrelated error."""
    fields = inner = json.loads((run.folder / "config.json").read_text())
    *outer, name = place.split(".")
    for each in outer:
        inner = inner[each]
    inner[name] = value
    (run.folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(RunError, match=rf"config\.json is damaged \(.*{message}"):
        run.config()


def test_a_missing_file_is_an_error_that_names_it(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        Run(tmp_path).config()
    with pytest.raises(RunError, match=r"no checkpoint\.safetensors yet"):
        run.model()
    with pytest.raises(RunError, match="is not complete: continue it"):
        run.results()
    assert run.metrics() == []


def test_an_epoch_is_written_and_read_back(run: Run) -> None:
    state = {"done": torch.tensor([7]), "model.x": torch.rand(3)}
    run.save_epoch([FIRST], checkpoint(), state)
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    assert run.load_state(into) == [FIRST]
    assert all(torch.equal(into[name], state[name]) for name in state)
    assert {name: tensor.data_ptr() for name, tensor in into.items()} == places
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
        "state.safetensors",
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.safetensors", "state.safetensors"])
def test_a_full_disk_leaves_the_epoch_before(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, state = Path.write_bytes, {"done": torch.tensor([7])}

    def full(path: Path, data: bytes) -> int:
        if name in path.name:
            write(path, data[:5])
            raise OSError(28, "No space left on device")
        return write(path, data)

    run.save_epoch([FIRST], checkpoint(), state)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device: .*/{name}"):
        run.save_epoch([FIRST, FIRST], checkpoint(), {"done": torch.tensor([14])})
    into = {"done": torch.zeros(1, dtype=torch.int64)}
    assert run.load_state(into) == [FIRST]
    assert into == state


def test_metrics_beyond_the_saved_state_are_dropped(run: Run) -> None:
    """If a fit is killed between the two writes, the metrics have an epoch that is fitted again."""
    state = {"done": torch.tensor([7])}
    run.save_epoch([FIRST], checkpoint(), state)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(asdict(replace(FIRST, epoch=2))) + "\n")
    assert run.load_state(state) == [FIRST]


def test_a_damaged_or_foreign_state_is_refused(run: Run) -> None:
    run.save_epoch([FIRST], checkpoint(), {"done": torch.tensor([7])})
    with pytest.raises(RunError, match="belongs to another model"):
        run.load_state({"other": torch.tensor([7])})
    (run.folder / "state.safetensors").write_bytes(b"damaged!")
    with pytest.raises(RunError, match=r"state\.safetensors is damaged"):
        run.load_state({"done": torch.tensor([7])})


def test_equal_tensors_give_equal_bytes(run: Run) -> None:
    files = []
    for _ in range(2):
        run.save_epoch([FIRST], checkpoint(), checkpoint() | {"done": torch.tensor([7])})
        names = ("checkpoint.safetensors", "state.safetensors")
        files.append([(run.folder / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_the_model_comes_back_with_the_statistics_asked_for(run: Run) -> None:
    tensors = checkpoint()
    run.save_checkpoint(tensors)
    with pytest.raises(RunError, match=r"lacks population\.norm1\.mean: continue it"):
        run.model("population")
    population = {
        f"population.{name}.{moment}": torch.full_like(statistics(layer)[0], value)
        for name, layer in norm_layers(BNLeNet()).items()
        for moment, value in zip(MOMENTS, (5.0, 6.0), strict=True)
    }
    run.save_checkpoint(tensors | population)
    model = run.model("population")
    assert not model.training
    assert torch.equal(model.state_dict()["conv1.weight"], tensors["conv1.weight"])
    for layer in norm_layers(model).values():
        mean, variance = statistics(layer)
        assert mean.tolist() == [5.0] * len(mean)
        assert variance.tolist() == [6.0] * len(variance)
    _, variance = statistics(norm_layers(run.model("moving"))["norm4"])
    assert torch.equal(variance, tensors["norm4.running_var"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": {}}'])
def test_damaged_results_are_refused(run: Run, text: str) -> None:
    (run.folder / "results.json").write_text(text)
    with pytest.raises(RunError, match=r"results\.json is damaged"):
        run.results()


def test_a_state_without_its_metrics_is_refused(run: Run) -> None:
    state = {"done": torch.tensor([7])}
    run.save_epoch([FIRST], checkpoint(), state)
    with pytest.raises(RunError, match="belongs to another model"):
        run.load_state({"done": torch.zeros(2, dtype=torch.int64)})
    for text in ("{", "[1]", '{"epoch": 1}'):
        (run.folder / "metrics.jsonl").write_text(text)
        with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
            run.load_state(state)
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="lacks metrics of its epochs"):
        run.load_state(state)


def test_a_folder_in_place_of_the_checkpoint_is_refused(run: Run) -> None:
    (run.folder / "checkpoint.safetensors").mkdir()
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged"):
        run.model()


def test_a_checkpoint_of_another_model_is_refused(run: Run) -> None:
    run.save_checkpoint(checkpoint() | {"linear3.bias": torch.zeros(9)})
    with pytest.raises(RunError, match="is of another model"):
        run.model()


def test_a_finished_run_keeps_no_state(run: Run) -> None:
    run.save_epoch([FIRST], checkpoint(), {"done": torch.tensor([7])})
    assert not run.complete
    results = {"scores": {}, "confusion": [], "temperature": 1.0, "seconds": {}}
    run.finish(results)
    assert run.complete
    assert run.results() == results
    assert not (run.folder / "state.safetensors").exists()
