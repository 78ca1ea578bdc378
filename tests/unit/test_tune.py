"""The tune command without a GPU: what it tries, picks, prints, stores; launches are invented."""

import dataclasses
import json

import pytest
import torch
from flasheva_compile.lowering import launch, recording, schedule
from flasheva_compile.lowering.schedule import choose, known_target
from flasheva_compile.lowering.schedule_cost import candidates
from flasheva_compile.lowering.spec import KernelSpec, Schedule

from flasheva_compile import tune
from flasheva_compile.ops import flasheva_attention

TARGET = known_target("sm_90", device="an H100")
SPEC = KernelSpec(
    kind="forward", dtype="bf16", head_dim=64, value_dim=64, chunk_size=16, window_size=256
)
DQ = SPEC.of_kind("dq")
SLOW, FAST = (
    Schedule(block_m=64, block_n=n, num_warps=4, num_stages=2, split_window=True) for n in (16, 32)
)
COMMAND = ["--heads", "4", "--head-dim", "64", "--length", "1024"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))
    schedule.forget()
    yield
    schedule.forget()


def measurement(spec, tried, milliseconds, note=""):
    return tune.Measurement(spec=spec, schedule=tried, milliseconds=milliseconds, note=note)


def measure(specs, times, top=3, fails=()):
    """Measure with invented times: of a schedule, else 1 ms."""

    def repeat(spec):
        tried = choose(spec, TARGET)
        if tried in fails:
            raise RuntimeError("out of resource: shared memory")
        return times.get(tried, 1.0)

    def launches():
        return {spec: (lambda spec=spec: repeat(spec)) for spec in (SPEC, DQ)}

    return tune.measure(specs, TARGET, top=top, launches=launches, timer=lambda f: f())


def test_it_tries_specialised_warps_whatever_was_tuned_before():
    special = schedule.specialised(SPEC, TARGET)
    assert special
    plain = schedule.choose_alike(SPEC, TARGET)
    with schedule.forced({SPEC: plain}):
        assert list(tune._tried(SPEC, TARGET, 0)) == [plain, special]


def test_what_was_tuned_is_forgotten_where_warps_do_not_specialise_either(monkeypatch):
    before = schedule.choose_alike(SPEC, TARGET)
    tuned = dataclasses.replace(before, num_stages=before.num_stages + 1)
    monkeypatch.setattr(schedule, "tuned", lambda *_: tuned)
    assert schedule.choose_alike(SPEC, TARGET) == before
    schedule.forget()
    assert schedule.choose_alike(SPEC, TARGET) == tuned


def test_it_tries_the_current_choice_and_the_best_candidates():
    found = measure([SPEC, DQ], {})
    for spec in (SPEC, DQ):
        tried = {m.schedule for m in found if m.spec == spec}
        assert tried == {choose(spec, TARGET), *candidates(spec, TARGET)[:3]}
        notes = {m.schedule: m.note for m in found if m.spec == spec}
        assert [s for s, note in notes.items() if note] == [choose(spec, TARGET)]


def test_the_fastest_wins_and_comes_first():
    best = candidates(SPEC, TARGET)[1]
    found = measure([SPEC, DQ], {best: 0.25})
    assert found[0] == measurement(SPEC, best, 0.25)
    assert [m.spec.kind for m in found] == sorted((m.spec.kind for m in found), reverse=True)
    assert {spec: m.schedule for spec, m in tune.winners(found).items()}[SPEC] == best


def test_what_does_not_run_is_noted_and_never_wins():
    broken = candidates(SPEC, TARGET)[0]
    found = measure([SPEC], {broken: 0.0}, fails={broken})
    assert found[-1].note == "RuntimeError: out of resource: shared memory"
    assert tune.winners(found)[SPEC].schedule != broken
    assert tune.winners([found[-1]]) == {}


def test_winners_are_stored_used_and_kept_apart_by_device():
    path = tune.store({SPEC: measurement(SPEC, FAST, 0.5)}, TARGET.device)
    assert path == schedule.tuned_path()
    assert choose(SPEC, TARGET) == FAST
    assert choose(SPEC, known_target("sm_90", device="another")) != FAST
    tune.store({DQ: measurement(DQ, SLOW, 0.5)}, TARGET.device)
    tune.store({SPEC: measurement(SPEC, SLOW, 0.5)}, "another")
    assert (choose(SPEC, TARGET), choose(DQ, TARGET)) == (FAST, SLOW)
    assert choose(SPEC, known_target("sm_90", device="another")) == SLOW
    assert set(json.loads(path.read_text())) == {TARGET.device, "another"}
    assert list(path.parent.iterdir()) == [path]


def test_storing_replaces_a_broken_file():
    path = schedule.tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        tune.store({SPEC: measurement(SPEC, FAST, 0.5)}, TARGET.device)
    assert choose(SPEC, TARGET) == FAST


def test_the_table_shows_times_schedules_and_notes():
    current = dataclasses.replace(SLOW, tma=True)
    text = tune.table([measurement(SPEC, FAST, 0.125), measurement(SPEC, current, 0.25, "current")])
    lines = text.splitlines()
    assert lines[1].split()[:3] == ["forward", "0.1250", "block_m=64,"]
    assert "tma=True" not in lines[1]
    assert "tma=True" in lines[2]
    assert lines[2].endswith("(current)")


def test_launches_are_recorded_and_repeated_with_the_schedule_of_then(monkeypatch):
    ran = []

    def run(spec, programs, values):
        ran.append((spec.kind, programs(choose(spec, TARGET)), values))

    def fake_pass(attention, device, *, pooling_alone):
        for spec in (SPEC, DQ):
            launch.run(spec, lambda s: s.block_n, {"pooling": pooling_alone})

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(tune, "_run", fake_pass)
    found = tune.launches_of(None, ["dq", "dpool"], device="cpu")
    assert list(found) == [DQ]
    assert launch.run is run
    ran.clear()
    with schedule.forced({DQ: FAST}):
        found[DQ]()
    assert ran == [("dq", 32, {"pooling": True})]


@pytest.mark.parametrize("rule", ["tangent", "mean"])
def test_what_is_measured_is_what_calls_launch(rule):
    """Pooling writes columns of biases here and there, or nowhere: means of whole chunks."""
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 64, "value_dim": 64, "length": 512}
    kinds = ["chunk_tokens", "bias_columns", "forward"]
    with recording.recorded(TARGET):
        found = tune.launches_of(tune.Attention(**sizes, chunk_rule=rule), kinds, device="cpu")
    x, phi = torch.zeros(1, 2, 512, 64).bfloat16(), torch.zeros(2, 64).bfloat16()
    with recording.recorded(TARGET) as launched:
        parameters = [phi] if rule == "tangent" else []
        flasheva_attention(x, x, x, parameters=parameters, window_size=256, chunk_size=16)
    assert list(found) == launched
    assert [spec.bias_columns for spec in found] == [rule == "tangent", False]


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main(COMMAND) == 2
    assert "no GPU found" in capsys.readouterr().err
    assert not schedule.tuned_path().exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--kv-heads", "3"], "--heads must be a multiple of --kv-heads"),
        (["--window-size", "100"], "--window-size must be a multiple of --chunk-size"),
        (["--kernels", "decode"], "invalid choice: 'decode'"),
    ],
)
def test_a_wrong_command_is_refused(changes, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(COMMAND + changes)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_measures_prints_and_stores(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(schedule, "current_target", lambda: TARGET)
    monkeypatch.setattr("triton.testing.do_bench", lambda f, **_: f())
    seen = []

    def launches_of(attention, kinds):
        seen.append((attention, kinds))
        return {SPEC: lambda: 1.0 if choose(SPEC, TARGET) != FAST else 0.5}

    monkeypatch.setattr(tune, "launches_of", launches_of)
    monkeypatch.setattr(tune, "candidates", lambda spec, target: (SLOW, FAST))
    command = [*COMMAND, "--kv-heads", "2", "--bidirectional", "--kernels", "forward"]
    assert tune.main([*command, "--dry-run"]) == 0
    assert not schedule.tuned_path().exists()
    assert tune.main(command) == 0
    assert "stored for an H100" in capsys.readouterr().out
    assert choose(SPEC, TARGET) == FAST
    attention, kinds = seen[0]
    assert (attention.kv_heads, attention.value_dim, attention.causal) == (2, 64, False)
    assert kinds == ["forward"]
