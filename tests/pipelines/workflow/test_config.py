"""Configuration: defaults < file < command line, and a sentence for everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipelines.data.sources.config import DatasetConfig
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.stages.token_map import TokenMapConfig
from pipelines.workflow.config import (
    ConfigError,
    identity,
    load_config,
    merge,
    read_text,
    redacted,
    set_by,
    to_dict,
    with_overrides,
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    num_workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Layer:
    width: int = 8
    label: str | None = None
    execution: Speed = field(default_factory=Speed)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str
    rate: float = 0.5
    is_quick: bool = False
    sizes: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.99)
    layer: Layer = field(default_factory=Layer)
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}; it must be at least 0")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    """Write run.yaml, or several files by name, and load run.yaml."""

    def run(files: str | bytes | Mapping[str, str], *overrides: str) -> Experiment:
        for name, text in (files if isinstance(files, Mapping) else {"run.yaml": files}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(Experiment, tmp_path / "run.yaml", overrides)

    return run


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(load) -> None:
    assert load("name: a") == Experiment(name="a")
    assert load("{name: a, rate: 2, layer: {width: 3}}") == Experiment(name="a", rate=2.0, layer=Layer(width=3))
    assert load("{name: a, rate: 2, layer: {width: 3, label: x}}", "layer.width=4", "name=b", "name=c") == Experiment(
        name="c", rate=2.0, layer=Layer(width=4, label="x")
    )
    config = load("{name: a, sizes: [4, 5, 6]}", "betas=[0.1,0.2]")
    assert config.sizes == (4, 5, 6) and config.betas == (0.1, 0.2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("nmae=x", "unknown key nmae; did you mean name?"),
        ("layer.widht=3", "unknown key layer.widht; did you mean layer.width?"),
        ("layer.execution.num_worker=3", "unknown key layer.execution.num_worker; did you mean layer.execution.num_workers?"),
        ("layer.zzz=3", "unknown key layer.zzz; known here: width, label, execution"),
        ("layers.width=3", "unknown key layers; did you mean layer?"),
    ],
)
def test_an_unknown_key_is_named_with_the_closest_known_one(load, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("name: a", override)
    assert str(caught.value) == f"override {override}: {sentence}"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rate=fast", "rate"),
        ("is_quick=perhaps", "is_quick"),
        ("layer.width=many", "layer.width"),
        ("layer.width=1.5", "layer.width"),
        ("layer.width=null", "layer.width"),
        ("layer.width=[1]", "layer.width"),
        ("layer=3", "layer"),
        ("extras=[]", "extras"),
        ("layer=null", "layer"),
        ("sizes=[1,two]", "sizes"),
        ("sizes=7", "sizes"),
        ("betas=[0.9]", "betas"),
        ("betas=[0.9,0.99,0.999]", "betas"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_in_one_line(load, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("name: a", override)
    message = str(caught.value)
    assert key in message and "\n" not in message and "$" not in message and len(message) < 200


def test_other_wrong_values_and_overrides_are_named(load) -> None:
    for text, override, sentence in (
        ("rate: 1", "rate=2", "does not give name"),
        ("", "rate=2", "does not give name"),
        ("name: a", "rate=-1", r"rate is -1\.0; it must be at least 0"),
        *(("name: a", override, "write key=value") for override in ("rate", "=3", "", "--rate 3")),
        ("name: ${nowhere}", "rate=2", "nowhere"),
        ("name: a", "layer.label=${oc.env:HOME}", r"override layer\.label.*resolvers"),
        *(
            ("name: a", f"rate={value}", r"run\.yaml: rate is (nan|inf|-inf); it must be a finite")
            for value in ("nan", ".inf", "-inf")
        ),
        ("{name: a, betas: [0.9, .nan]}", "rate=2", r"betas\.1 is nan"),
        ("{name: a, extras: {x: {y: .inf}}}", "rate=2", r"extras\.x\.y is inf"),
        ("name: a", "sizes=" + "[" * 5000, r"override sizes=\[+ has more than 50 levels, which no config needs"),
        ("name: a", "base=other.yaml", r"override base=other\.yaml: only a config file can name a base"),
        (
            "{name: a, layer: {execution: {num_workrs: 2}}}",
            "rate=2",
            r"run\.yaml: unknown key .*num_workrs; did you mean",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load(text, override)


def test_a_reference_to_another_key_is_resolved(load) -> None:
    assert load("{name: '${layer.label}-big', layer: {label: net}}").name == "net-big"
    assert load("{name: '${layer.label}:6379 ${layer.width}', layer: {label: host}}").name == "host:6379 8"


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:HOME}",
        "{name: a, layer: {label: 'in ${oc.env:HOME}'}}",
        "{name: a, extras: {deep: [1, {deeper: '${oc.env:HOME}'}]}}",
        "{name: a, layer: {label: '${oc.decode:${name}}'}}",
        "{name: a, layer: {label: '${name}${oc.env:HOME}'}}",
        "{name: env, layer: {label: '${oc.${name}:HOME}'}}",
    ],
)
def test_resolvers_are_refused_so_that_no_secret_is_read_from_the_environment(load, text: str) -> None:
    with pytest.raises(ConfigError, match="resolvers"):
        load(text)


def test_a_missing_or_unreadable_file_is_named(load, tmp_path: Path) -> None:
    load("name: a")
    for path, sentence in (
        ("nowhere.yaml", r"nowhere\.yaml does not exist; did you mean|nowhere\.yaml does not exist; fix the path"),
        ("run.yaml/run.yaml", r"run\.yaml/run\.yaml"),
        (".", r"cannot be read \(Is a directory\)"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_config(Experiment, tmp_path / path)


def test_a_file_without_a_mapping_in_yaml_is_named_in_one_line(load, tmp_path: Path) -> None:
    for text, sentence in (
        *((text, "cannot be read as YAML") for text in ("name: [", "a: b: c", b"\xff\xfe\x00\x01", "\tname: a")),
        ("name: " + "[" * 50_000, "has more than 50 levels"),
        ("a: &a [1]\n" + "".join(f"b{n}: &b{n} [*{(n and f'b{n - 1}') or 'a'}, *a]\n" for n in range(30)), "more than 20 aliases"),
        ("name: a\n" + "#" * (1 << 20), "a config has at most 1,048,576"),
        *((text, "does not contain a mapping") for text in ("[1, 2]", "- name: a")),
        *((text, "") for text in ("just words", "42")),
    ):
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/run\.yaml.*{sentence}") as caught:
            load(text)
        assert "\n" not in str(caught.value)


# Fields that the pipeline sets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Page:
    rows: int = 3
    title: str | None = set_by("name")


@dataclass(frozen=True, kw_only=True)
class Paged:
    name: str
    page: Page | None = None
    pages: dict[str, Page] = field(default_factory=dict)


@pytest.mark.parametrize("text", ["{name: a, page: {title: b}}", "name: a"])
def test_a_value_that_would_be_ignored_is_refused_with_the_key_to_use_instead(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"page\.title would be ignored.*; use name instead"):
        load_config(Paged, path, ["page={rows: 4, title: c}"])
    with pytest.raises(ConfigError, match=r"variant b: page\.title would be ignored"):
        with_overrides(Paged(name="a"), {"page": {"title": "b"}}, "variant b")


def test_a_field_that_the_pipeline_sets_may_be_null_and_comes_back_from_a_record(load) -> None:
    assert load_config(Paged, None, ["name=a", "page.title=null"]) == Paged(name="a", page=Page())
    recorded = Paged(name="a", page=Page(title="b"))
    assert merge(Paged, [("a record", OmegaConf.create(to_dict(recorded)))]) == recorded


def test_an_unknown_key_below_a_free_name_is_named_with_the_closest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key pages\.x\.row; did you mean pages\.x\.rows\?"):
        load_config(Paged, None, ["name=a", "pages.x.row=1"])


# Bases --------------------------------------------------------------------------------------------------------------------


def test_a_config_builds_on_its_base_and_that_on_another(load) -> None:
    files = {
        "run.yaml": "{base: common/middle.yaml, name: top, layer: {execution: {num_workers: 8}}}",
        "common/middle.yaml": "{base: bottom.yaml, sizes: [7], layer: {label: middle}, extras: {a: 1}}",
        "common/bottom.yaml": "{name: bottom, rate: 2, sizes: [4, 5], layer: {width: 3, label: bottom}, extras: {b: 2}}",
    }
    layer = Layer(width=3, label="middle", execution=Speed(num_workers=8))
    merged = Experiment(name="top", rate=2.0, sizes=(7,), layer=layer, extras={"a": 1, "b": 2})
    assert load(files) == merged
    assert load(files, "layer.width=9") == replace(merged, layer=replace(layer, width=9))


def test_a_reference_in_a_base_is_resolved_over_all_files_and_overrides(load) -> None:
    files = {"base.yaml": "name: ${layer.label}-${layer.width}", "run.yaml": "{base: base.yaml, layer: {label: net}}"}
    assert load(files).name == "net-8" and load(files, "layer.width=2").name == "net-2"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"run.yaml": "base: run.yaml"}, ["{0}/run.yaml -> {0}/run.yaml"]),
        (
            {"run.yaml": "base: a.yaml", "a.yaml": "base: b.yaml", "b.yaml": "base: ./a.yaml"},
            ["{0}/run.yaml -> {0}/a.yaml -> {0}/b.yaml -> {0}/a.yaml"],
        ),
        ({"run.yaml": "base: nowhere.yaml"}, ["{0}/nowhere.yaml (the base of {0}/run.yaml) does not exist"]),
        ({"run.yaml": "base: bas.yaml", "base.yaml": "name: a"}, ["did you mean {0}/base.yaml?"]),
        ({"run.yaml": "base: a.yaml", "a.yaml": "[1]"}, ["{0}/a.yaml (the base of {0}/run.yaml)", "mapping"]),
        ({"run.yaml": "base: [a.yaml]", "a.yaml": "name: a"}, ["{0}/run.yaml: base is ['a.yaml']"]),
        ({"run.yaml": "{name: a, base: '${name}.yaml'}", "a.yaml": "name: a"}, ["{0}/run.yaml: base is '${{name}}.yaml'"]),
        ({"run.yaml": "base: a.yaml", "a.yaml": "name: '${oc.env:HOME}'"}, ["{0}/a.yaml: resolvers"]),
        ({"run.yaml": "base: a.yaml", "a.yaml": "{name: a, nmae: b}"}, ["{0}/a.yaml: unknown key nmae"]),
        ({"run.yaml": "base: a.yaml", "a.yaml": "rate: 1"}, ["{0}/run.yaml does not give name"]),
    ],
)
def test_a_wrong_base_is_refused_in_a_line_that_names_the_files(load, tmp_path, files, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(files)
    message = str(caught.value)
    assert all(part.format(tmp_path) in message for part in named) and "\n" not in message


def test_the_text_of_a_config_includes_its_base(load, tmp_path: Path) -> None:
    files = {"a.yaml": "{name: a, extras: {x: '${rate}'}}", "run.yaml": "{base: a.yaml, rate: 3}"}
    config = load(files)
    alone = tmp_path / "elsewhere" / "run.yaml"
    alone.parent.mkdir()
    alone.write_text(read_text(tmp_path / "run.yaml"))
    assert load_config(Experiment, alone) == config == Experiment(name="a", rate=3.0, extras={"x": 3})
    assert load_config(Experiment, alone, ["rate=4"]).extras == {"x": 4}, "a reference is kept, so overrides still reach it"
    assert read_text(tmp_path / "a.yaml") == files["a.yaml"]


# Whole configs -------------------------------------------------------------------------------------------------------------


@given(
    rate=st.floats(0, 1e9, allow_nan=False),
    width=st.integers(-(2**31) + 1, 2**31 - 1),
    label=st.none() | st.text("abc é.-", min_size=1, max_size=8),
    sizes=st.lists(st.integers(-1000, 1000), max_size=4),
)
def test_a_config_comes_back_from_its_plain_values(rate: float, width: int, label: str | None, sizes: list[int]) -> None:
    config = Experiment(name="a", rate=rate, sizes=tuple(sizes), layer=Layer(width=width, label=label))
    assert merge(Experiment, [("values", OmegaConf.create(to_dict(config)))]) == config


def test_overrides_of_a_config_are_checked_and_do_not_change_it() -> None:
    config = Experiment(name="a", layer=Layer(width=3))
    changed = with_overrides(config, {"layer": {"label": "x"}}, "variant b")
    assert changed == replace(config, layer=Layer(width=3, label="x")) and config.layer.label is None
    with pytest.raises(ConfigError, match=r"variant b: unknown key layer\.labl; did you mean layer\.label\?"):
        with_overrides(config, {"layer": {"labl": "x"}}, "variant b")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:password@host:5000/path", "http://host:5000/path"),
        ("postgresql://token@host/runs", "postgresql://host/runs"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("folder/with@sign", "folder/with@sign"),
        ("first://a:b@c second://d:e@f", "first://c second://f"),
        ("http://user:pass@word@host", "http://host"),
        ("http://user:pass/word@host", "http://host"),
        ("postgresql://host/db?user=u&password=p&sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql://u:p@host/db?sslmode=require&PASSWORD=p", "postgresql://host/db?sslmode=require"),
        ("postgresql://host/db?password=p", "postgresql://host/db"),
        ("mysql+pymysql:///db?unix_socket=/s&password=p@q", "mysql+pymysql:///db?unix_socket=/s"),
        ("https://b.example.org/k?X-Amz-Signature=p&X-Amz-Expires=9", "https://b.example.org/k?X-Amz-Expires=9"),
        ("http://user:p?token=x@host/a", "http://"),
        ("http://host/a?page=1", "http://host/a?page=1"),
        ("s3://bucket/team@x/store", "s3://bucket/team@x/store"),
        ("s3://key:pass/word@bucket/store", "s3://bucket/store"),
        ("s3://bucket/team@x,http://user:p@host", "s3://bucket/team@x,http://host"),
        ("hf://owner/name/a.pth@main", "hf://owner/name/a.pth@main"),
        ("sqlite:////data/team@x/mlflow.db", "sqlite:////data/team@x/mlflow.db"),
    ],
)
def test_redacted_removes_credentials_from_uris_at_any_depth(uri: str, shown: str) -> None:
    config = Experiment(name=uri, layer=Layer(label=uri), extras={"deep": [uri, {"deeper": uri}], "number": 3})
    assert redacted(config) == {
        **to_dict(config),
        "name": shown,
        "layer": {**to_dict(config.layer), "label": shown},
        "extras": {"deep": [shown, {"deeper": shown}], "number": 3},
    }
    assert config.name == uri


def test_identity_leaves_out_execution_at_any_depth() -> None:
    one = Experiment(name="a", layer=Layer(execution=Speed(num_workers=1)))
    many = Experiment(name="a", layer=Layer(execution=Speed(num_workers=64)))
    assert identity(one) == identity(many) and "execution" not in str(identity(one))
    assert identity(one) != identity(replace(one, layer=Layer(width=9)))


def test_the_identity_of_a_dataset_is_its_content_and_not_its_path(
    image_folder: Path, make_image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A stage leaves it out: the index of the dataset is one of its inputs."""

    def of(root: Path) -> Any:
        return identity({"data": DatasetConfig(kind="image_folder", path=str(root))})

    copy = make_image_folder(tmp_path / "copy")
    assert of(copy) == of(image_folder)
    assert str(copy) not in str(of(copy))
    assert of(make_image_folder(tmp_path / "larger", per_class=7)) != of(copy)
    here, there = DatasetConfig(kind="image_folder", path=str(image_folder)), DatasetConfig(kind="images", path="/nowhere")
    assert identity(TokenMapConfig(dataset=here)) == identity(TokenMapConfig(dataset=there))
    assert "dataset" not in str(identity(TokenMapConfig(dataset=here)))


def test_the_config_of_the_demo_has_the_values_of_its_file() -> None:
    path = Path(__file__).parents[3] / "configs" / "digits.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))

    def assert_holds(config: Any, given: Mapping[str, Any]) -> None:
        for key, value in given.items():
            own = getattr(config, key)
            if isinstance(value, dict) and not isinstance(own, dict):
                assert_holds(own, value)
            else:
                assert own == (tuple(value) if isinstance(value, list) else value), key

    run = load_run(path, ("seed=5",))
    assert_holds(run, values)
    assert run.seed == 5 and run.cluster == RunConfig(name="x").cluster
