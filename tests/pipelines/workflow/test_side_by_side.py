"""Stages side by side: they overlap as far as there is room, make the same as one by one, and end together."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.cluster import connection, waiting
from pipelines.cluster.capacity import Capacity, Room
from pipelines.cluster.resources import Execution, Workers
from pipelines.workflow import driver
from pipelines.workflow.interruption import StageThread, on_interrupt
from pipelines.workflow.node_run import Session
from pipelines.workflow.progress import Bar
from pipelines.workflow.stage import Node, Stage, StageContext, StageError, StageResult

_LONG = 60.0  # for what happens at once, unless it never does


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    word: str
    execution: Workers = field(default_factory=Workers)


Act = Callable[[WordConfig, StageContext], object]


def _node(id: str, act: Act = lambda config, context: None, reads: Sequence[str] = (), **options: Any) -> Node:
    """A node that does something and writes its word after those that it reads."""

    def run(config: WordConfig, inputs: Mapping[str, Manifest], context: StageContext) -> StageResult:
        act(config, context)
        before = [context.store.fetch(manifest, "text").read_text() for _, manifest in sorted(inputs.items())]
        text = "".join([*before, config.word])
        return StageResult(files=[context.write("text", lambda path: path.write_text(text))])

    config = WordConfig(word=id, execution=options.pop("execution", Workers()))
    return Node(id, Stage("write", 1, run, **options), config, {name: name for name in reads})


def _meeting(number: int) -> Act:
    """All that do this wait for each other: stages that run one by one never meet."""
    barrier = threading.Barrier(number)

    def act(config: WordConfig, context: StageContext) -> None:
        barrier.wait(_LONG)

    return act


@pytest.fixture
def session(local_store: ArtifactStore, make_session: Callable[..., Any]) -> Session:
    return make_session(local_store)


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretend that a cluster of one node has so many CPUs."""
    monkeypatch.setattr(connection, "is_connected", lambda: False)  # another test may have connected this process
    return lambda number: monkeypatch.setattr(connection, "capacity", lambda: Capacity(({"CPU": number},)))


def _connecting(config: WordConfig, context: StageContext) -> None:
    context.connect()


# Running -------------------------------------------------------------------------------------------------------------------


def test_stages_that_do_not_need_each_other_overlap(session: Session, cpus: Callable[[float], None]) -> None:
    cpus(3)
    meet = _meeting(3)
    first = _node("first", _connecting)
    nodes = [first, *(_node(id, meet, ["first"]) for id in "abc"), _node("last", reads="abc")]
    done = driver.execute(nodes, session, num_jobs=None)
    assert [item.node.id for item in done] == [node.id for node in nodes], "the answer is in the order of the graph"
    assert session.store.fetch(done[-1].manifest, "text").read_text() == "firstafirstbfirstclast"


@pytest.mark.parametrize(("num_jobs", "of_siblings"), [(None, False), (1, True)])
def test_a_stage_that_all_others_wait_for_is_alone(
    num_jobs: int | None, of_siblings: bool, session: Session, cpus: Callable[[float], None]
) -> None:
    cpus(3)
    alone: dict[str, bool] = {}
    meet = _meeting(2) if num_jobs is None else lambda config, context: None

    def act(config: WordConfig, context: StageContext) -> None:
        alone[config.word] = context.is_alone
        if config.word in "ab":
            meet(config, context)

    driver.execute([_node("made")], session)
    nodes = [_node("made"), _node("first", act), *(_node(id, act, ["first"]) for id in "ab"), _node("last", act, reads="ab")]
    driver.execute(nodes, session, num_jobs=num_jobs)
    assert alone == {"first": True, "a": of_siblings, "b": of_siblings, "last": True}


@pytest.mark.parametrize("num_jobs", [1, 2, None])
def test_artifacts_are_the_same_however_many_stages_run_at_once(
    num_jobs: int | None, session: Session, cpus: Callable[[float], None], tmp_path: Path, make_session: Callable[..., Any]
) -> None:
    from pipelines.artifacts.open import open_store

    cpus(8)
    nodes = [_node("first"), *(_node(id, reads=["first"]) for id in "abcd"), _node("last", reads="abcd")]
    plain = make_session(open_store(str(tmp_path / "plain")))
    expected = [item.manifest for item in driver.execute(nodes, plain)]
    made = [item.manifest for item in driver.execute(nodes, session, num_jobs=num_jobs)]
    assert [(each.key, each.digest) for each in made] == [(each.key, each.digest) for each in expected]


@pytest.mark.parametrize(("num_cpus", "num_jobs", "most"), [(2, None, 2), (8, 3, 3), (8, None, 4), (1, None, 1), (8, 1, 1)])
def test_no_more_stages_run_at_once_than_there_is_room_for(
    num_cpus: float, num_jobs: int | None, most: int, session: Session, cpus: Callable[[float], None]
) -> None:
    cpus(num_cpus)
    lock, running, counts = threading.Lock(), set[str](), list[int]()

    def act(config: WordConfig, context: StageContext) -> None:
        with lock:
            running.add(config.word)
            counts.append(len(running))
        time.sleep(0.05)
        with lock:
            running.discard(config.word)

    driver.execute([_node("first", _connecting), *(_node(id, act, ["first"]) for id in "abcd")], session, num_jobs=num_jobs)
    assert max(counts) <= most and len(counts) == 4


@pytest.mark.parametrize(
    ("variables", "num_workers"),
    [({}, 3), ({"ENAT_CLUSTER_GROWS": "1", "ENAT_CLUSTER_SIZE": "2x8xCPU"}, 16)],
    ids=["as many as there are", "as many as the cluster grows to"],
)
def test_all_workers_are_a_number_when_a_stage_runs(
    variables: dict[str, str],
    num_workers: int,
    session: Session,
    cpus: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpus(3)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    counts: list[int] = []

    def count(config: WordConfig, context: StageContext) -> None:
        counts.append(config.execution.count)

    for num_jobs in (1, None):
        nodes = [_node(f"a{num_jobs}", count, execution=Workers(num_workers="all"))]
        driver.execute(nodes, session, num_jobs=num_jobs)
    assert counts == [num_workers] * 2


def test_work_is_committed_even_if_the_cluster_cannot_name_its_devices(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the node is gone")

    monkeypatch.setattr(connection, "is_connected", lambda: True)
    monkeypatch.setattr(connection, "machines", fail)
    (done,) = driver.execute([_node("a")], session)
    assert done.manifest.provenance["work"] == [] and "could not be read" in caplog.text


def test_a_cluster_that_grows_without_a_limit_has_no_all(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENAT_CLUSTER_GROWS", "1")
    with pytest.raises(ValueError, match=r"write.execution.num_workers is all, but .* adds nodes on demand; give a number, or set"):
        driver.execute([_node("a", execution=Workers(num_workers="all"))], session)


def test_a_stage_of_all_workers_waits_until_all_are_free(session: Session, cpus: Callable[[float], None]) -> None:
    cpus(2)
    running: list[str] = []

    def act(config: WordConfig, context: StageContext) -> None:
        context.connect()
        running.append(config.word)
        assert len(running) == 1
        time.sleep(0.05)  # long enough for another one to start, if it could
        running.remove(config.word)

    nodes = [_node(id, act, execution=Workers(num_workers=number)) for id, number in {"a": "all", "b": "all", "c": 2}.items()]
    assert len(driver.execute(nodes, session, num_jobs=None)) == 3


def test_stages_that_share_work_run_one_after_the_other(session: Session, cpus: Callable[[float], None]) -> None:
    """Scores by two protocols of the same samples. Those of other samples run beside them."""
    cpus(8)
    at_work: list[str] = []
    meet = _meeting(2)

    def act(config: WordConfig, context: StageContext) -> None:
        at_work.append(config.word)
        assert not {"x1", "x2"} <= {*at_work}
        if config.word in ("x1", "y"):
            meet(config, context)
        at_work.remove(config.word)

    sources = [_node("x", _connecting), _node("y0", reads=["x"])]
    scores = _node("x1", act, ["x"], shares_work_on="samples")
    samples = {"x1": "x", "x2": "x", "y": "y0"}
    nodes = [Node(id, scores.stage, WordConfig(word=id), {"samples": source}) for id, source in samples.items()]
    assert len(driver.execute([*sources, *nodes], session, num_jobs=None)) == 5


def test_a_stage_that_fails_ends_only_those_that_read_it(session: Session, cpus: Callable[[float], None]) -> None:
    cpus(8)
    meet = _meeting(2)

    def fail(config: WordConfig, context: StageContext) -> None:
        meet(config, context)
        raise RuntimeError("no memory [red]is[/] left")

    nodes = [_node("first", _connecting), _node("a", fail, ["first"]), _node("b", meet, ["first"])]
    nodes += [_node("after-a", reads=["a"]), _node("after-b", reads=["b"])]
    with pytest.raises(StageError, match="stage a failed: RuntimeError: no memory"):
        driver.execute(nodes, session, num_jobs=None)
    assert {manifest.config["word"] for manifest in session.store.manifests()} == {"first", "b", "after-b"}
    shown = session.console.file
    assert isinstance(shown, io.StringIO)
    assert shown.getvalue().count("no memory [red]is[/] left") == 1, "it is told while others go on"


def test_one_by_one_the_first_failure_ends_the_run(session: Session) -> None:
    def fail(config: WordConfig, context: StageContext) -> None:
        raise RuntimeError("no memory is left")

    with pytest.raises(StageError, match="no memory"):
        driver.execute([_node("a", fail), _node("b")], session)
    assert not [*session.store.manifests()]


def test_after_bad_input_nothing_new_is_started(session: Session, cpus: Callable[[float], None]) -> None:
    cpus(8)
    meet = _meeting(2)

    def refuse(config: WordConfig, context: StageContext) -> None:
        meet(config, context)
        raise ValueError("the labels are wrong")

    def after(config: WordConfig, context: StageContext) -> None:
        meet(config, context)
        deadline = time.monotonic() + _LONG
        while "labels" not in session.console.file.getvalue() and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.01)

    nodes = [_node("first", _connecting), _node("a", refuse, ["first"]), _node("b", after, ["first"]), _node("c", reads=["b"])]
    with pytest.raises(ValueError, match=r"^the labels are wrong$"):
        driver.execute(nodes, session, num_jobs=None)
    assert {manifest.config["word"] for manifest in session.store.manifests()} == {"first", "b"}


def test_connecting_happens_in_the_main_thread(session: Session, make_session: Callable[..., Any], cpus: Any) -> None:
    """The processes of a local cluster end with the thread that started them."""
    cpus(8)
    threads: list[threading.Thread] = []
    own = make_session(session.store, connect=lambda: threads.append(threading.current_thread()))
    driver.execute([_node(id, _connecting) for id in "ab"], own, num_jobs=2)
    assert len(threads) >= 3 and {*threads} == {threading.main_thread()}, "once ahead, and for each stage that asks"

    def refuse() -> None:
        raise ValueError("no Ray cluster runs at host:1")

    with pytest.raises(ValueError, match=r"^no Ray cluster runs at host:1$"):
        driver.execute([_node("c", _connecting)], make_session(session.store, connect=refuse), num_jobs=2)


# Interrupting --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupt_ends_all_stages(session: Session) -> None:
    """One of them waits for Ray, one wants to save first."""
    import ray

    ended: list[str] = []
    both = threading.Barrier(3)
    saving = threading.Event()

    def wait_for_ray(config: WordConfig, context: StageContext) -> None:
        try:
            both.wait(_LONG)
            waiting.get(ray.remote(num_cpus=0)(lambda: time.sleep(3600)).remote())
        except KeyboardInterrupt:
            ended.append("waited")
            raise

    def save(config: WordConfig, context: StageContext) -> None:
        with on_interrupt(saving.set):
            both.wait(_LONG)
            assert saving.wait(_LONG)
        ended.append("saved")
        raise KeyboardInterrupt

    def interrupt() -> None:
        both.wait(_LONG)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    nodes = [_node("first", _connecting), _node("a", wait_for_ray, ["first"]), _node("b", save, ["first"])]
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.execute(nodes, session, num_jobs=3)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == ["saved", "waited"]
    assert {manifest.config["word"] for manifest in session.store.manifests()} == {"first"}
    assert not [*Path(session.store.uri).rglob("lease.json")]


def test_a_second_interrupt_raises_in_a_stage_that_saves() -> None:
    outcomes: list[Any] = []
    asked, is_inside = threading.Event(), threading.Event()

    def work() -> None:
        with on_interrupt(asked.set):
            is_inside.set()
            while True:
                time.sleep(0.01)

    thread = StageThread("stage", work, outcomes.append)
    thread.start()
    assert is_inside.wait(_LONG)
    thread.interrupt()
    assert asked.is_set() and thread.is_alive()
    thread.interrupt()
    thread.join(_LONG)
    assert [type(outcome) for outcome in outcomes] == [KeyboardInterrupt]
    thread.interrupt()  # it is over


# Room ----------------------------------------------------------------------------------------------------------------------


def test_room_is_taken_node_by_node_and_given_back() -> None:
    room = Room(Capacity(({"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0})))
    on_gpus = room.take(Workers(num_workers=2, cpus_per_worker=1, gpus_per_worker=1), 0)
    assert on_gpus is not None and [place for place, _ in on_gpus.taken] == [1, 1] and on_gpus.spare_cpus == 0
    assert room.take(Workers(gpus_per_worker=1), 0) is None
    assert room.take(Workers(cpus_per_worker=3), 0) is not None, "node 1 has two CPUs left, node 0 four"
    assert room.take(Workers(cpus_per_worker=3), 0) is None
    room.give_back(on_gpus)
    assert room.take(Workers(cpus_per_worker=3), 0) is not None


@pytest.mark.parametrize(
    ("workers", "num_others", "spare"),
    [
        (Execution(num_workers=2), 0, 2),  # one each
        (Execution(num_workers=2), 7, 0),  # six are left, fewer than one for each of eight stages
        (Execution(num_workers=8), 0, 0),
        (Execution(num_workers=1, gpus_per_worker=1), 0, 7),
        (Workers(num_workers=2), 0, 0),  # of training, which nothing feeds
    ],
)
def test_stages_of_images_get_cpus_that_feed_their_workers(workers: Workers, num_others: int, spare: int) -> None:
    grant = Room(Capacity(({"CPU": 8.0, "GPU": 1.0},))).take(workers, num_others)
    assert grant is not None and grant.spare_cpus == spare


def test_elastic_training_starts_with_the_workers_that_fit() -> None:
    from pipelines.training.config import TrainExecution

    room = Room(Capacity(({"CPU": 3.0},)))
    grant = room.take(TrainExecution(num_workers=4, min_workers=2), 0)
    assert grant is not None and len(grant.taken) == 3
    assert room.take(TrainExecution(num_workers=4, min_workers=2), 0) is None


# Progress ------------------------------------------------------------------------------------------------------------------


def test_bars_of_stages_are_shown_below_each_other() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Bar(terminal, "train@a", 100, "steps") as first:
        with Bar(terminal, "generate", 8, "samples") as second:
            first.update(10)
            second.advance(2)
            with terminal.capture() as shown:
                terminal.print(second._display.progress.get_renderable())
            text = shown.get()
            assert "train@a" in text and "generate" in text and "samples" in text
        first.update(20)
        assert [task.description for task in first._display.progress.tasks] == ["train@a"]
    assert not first._display.progress.tasks
    with Bar(terminal, "evaluate", 1, "parts") as third:  # the display starts again
        assert third._display is first._display
