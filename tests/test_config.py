"""Every configuration composes, and a plugin's node is its dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tokenreduce import choices, configuration
from tokenreduce.configuration import CONFIG_MODULE, CONFIG_NAME, check_overrides, knobs_of, register_plugins
from tokenreduce.registry import BENCHMARKS, MODELS, REDUCERS
from tokenreduce.reporting.tracking import Tracking

CONFIGS = resources.files(CONFIG_MODULE)
REQUIRED = {
    "chain": ["reducer.reducers=[{name: pool, keep: 0.5}, {name: uniform, keep: 4}]"],
    "jsonl": ["benchmark.path=FOLDER"],
    "hf": ["benchmark.path=NAME"],
    "cmai": ["reducer.threshold=0.01", "reducer.layer=2"],
    "efficientvla": ["reducer.alpha=0.5", "reducer.layer=0.5"],
    "vmtc": ["reducer.clusters=0.25", "reducer.layer=-2", "reducer.iterations=10"],
}
"""What a choice that has no default for some knob cannot be composed without."""
GROUPS = ("model", "reducer", "budget", "benchmark", "runtime", "tracking", "launcher", "experiment")


@pytest.fixture(autouse=True)
def plugins() -> None:
    register_plugins()


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        yield


def options(group: str) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_a_group_composes(group: str) -> None:
    assert options(group)
    for choice in options(group):
        config = compose(CONFIG_NAME, [f"{group}={choice}", *REQUIRED.get(choice, [])])
        assert not OmegaConf.missing_keys(config), choice
        if group in choices.PLUGINS:
            choices.PLUGINS[group].create(config[group].name, **knobs_of(config[group], group))


@pytest.mark.parametrize("study", [file.name.removesuffix(".yaml") for file in (CONFIGS / "experiment").iterdir()])
def test_a_study_sweeps_over_settings_that_exist(study: str) -> None:
    hydra = check_overrides([f"experiment={study}"]).hydra
    assert hydra.mode.name == "MULTIRUN" and hydra.sweeper.params
    check_overrides([f"experiment={study}", *(f"{key}={value}" for key, value in hydra.sweeper.params.items())])


@pytest.mark.usefixtures("hydra")
def test_every_plugin_is_a_choice() -> None:
    assert set(REDUCERS.names()) <= set(options("reducer"))
    assert set(BENCHMARKS.names()) <= set(options("benchmark"))


@pytest.mark.usefixtures("hydra")
def test_every_file_is_a_choice_and_names_no_import_path() -> None:
    files = [(group.name, file) for group in CONFIGS.iterdir() if group.is_dir() for file in group.iterdir()]
    found = {(group, file.name.removesuffix(".yaml")) for group, file in files if file.name.endswith(".yaml")}
    assert found == {(group, name) for group, name in found if name in options(group)}
    assert len(found) > 8
    assert not [file.name for _, file in files if file.is_file() and "_target_" in file.read_text()]


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", sorted(set(REDUCERS.names()) - REQUIRED.keys()))
def test_a_knobs_default_is_the_dataclasss(name: str) -> None:
    node = compose(CONFIG_NAME, [f"reducer={name}"]).reducer
    created = REDUCERS.create(name, **knobs_of(node, "reducer"))
    assert created == REDUCERS.get(name)()
    assert set(knobs_of(node, "reducer")) == {field.name for field in dataclasses.fields(created)}


@pytest.mark.usefixtures("hydra")
def test_a_preset_is_its_plugin_with_other_knobs() -> None:
    node = compose(CONFIG_NAME, ["reducer=fopru_row_144", "reducer.layer=-3"]).reducer
    assert knobs_of(node, "reducer") == {**dataclasses.asdict(REDUCERS.get("fopru_row")()), "keep": 144, "layer": -3}


@pytest.mark.usefixtures("hydra")
def test_the_tracking_node_is_what_tracking_takes() -> None:
    for choice, enabled in (("wandb", True), ("none", False)):
        node = OmegaConf.to_container(compose(CONFIG_NAME, [f"tracking={choice}"]).tracking)
        assert isinstance(node, dict)
        assert Tracking(**{str(name): value for name, value in node.items()}) == Tracking(enabled=enabled, tags=[])


@pytest.mark.usefixtures("hydra")
def test_a_checkpoint_is_loaded_in_the_runtimes_precision_unless_the_model_says_otherwise() -> None:
    for choice in options("model"):
        assert set(compose(CONFIG_NAME, [f"model={choice}"]).model) == {
            "path",
            "revision",
            "dtype",
            "do_pad",
            "image",
        }
    assert compose(CONFIG_NAME, ["runtime=cuda_flash"]).runtime.attention == "flash_attention_2"
    assert MODELS.names()


@dataclass(frozen=True)
class Demanding:
    """A plugin's dataclass with a knob that has no default."""

    description: ClassVar[str] = ""
    folder: str
    sizes: tuple[int, ...] = (1, 2)
    limit: int = 3


def test_a_required_knob_is_asked_for() -> None:
    node = OmegaConf.create({"benchmark": {"name": "demanding", **configuration.knob_defaults(Demanding)}}).benchmark
    with pytest.raises(
        ValueError, match=r"benchmark 'demanding' needs a value for 'folder': add benchmark\.folder=VALUE"
    ):
        knobs_of(node, "benchmark")


def test_a_knob_with_the_name_of_a_run_setting_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BENCHMARKS, "usable", lambda: {"scenes": Demanding})
    with pytest.warns(UserWarning, match="its knob 'limit' cannot be set on the command line"):
        register_plugins()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reducer=fopru_ro", "unknown reducer 'fopru_ro': did you mean 'fopru_row'?"),
        ("reducer=fopru_row,fopru_rnk", "unknown reducer 'fopru_rnk': did you mean 'fopru_rank'?"),
        ("benchmark=scene", "unknown benchmark 'scene': did you mean 'scenes'?"),
        (
            "model=lava",
            "unknown model 'lava': did you mean 'llava'? (a checkpoint's directory is given as model.path=lava)",
        ),
        ("runtime=cud", "unknown runtime 'cud': did you mean 'cuda'?"),
        ("reducer.kep=0.5", "reducer 'fopru_row' has no knob 'kep': did you mean 'keep'?"),
        ("+reducer.kep=0.5", "did you mean 'keep'? (Hydra's '+' is not needed: every knob is there)"),
        ("benchmark.limt=3", "benchmark 'scenes' has no knob 'limt': did you mean 'limit'?"),
        ("runtime.batchsize=3", "unknown setting 'runtime.batchsize': did you mean 'batch_size'?"),
        ("otput=there", "unknown setting 'otput': did you mean 'output'?"),
        ("output.folder=there", "unknown setting 'output.folder': output has no parts"),
        ("output=a(b", "Quote a value that holds special characters"),
        ("tracking.tags=[a", "Quote a value that holds special characters"),
    ],
)
def test_a_mistyped_override_is_refused_with_the_near_name(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_overrides([override])
    assert message in str(caught.value)


def test_a_knob_is_looked_up_in_the_reducer_that_is_chosen() -> None:
    check_overrides(["reducer=random", "reducer.seed=3"])
    check_overrides(["reducer=fopru_row_144", "reducer.layer=0.5"])
    check_overrides(["reducer=random,uniform", "reducer.keep=0.1,0.2"])
    with pytest.raises(ValueError, match="reducer 'uniform' has no knob 'seed'"):
        check_overrides(["reducer=random,uniform", "reducer.seed=3"])
