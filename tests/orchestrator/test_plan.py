"""Plan files: what is written is read back, and every slip of an editing hand is named with its line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.spans import BlockSpan
from orchestrator.cost import Cost, StageProfile
from orchestrator.plan import (
    DTYPES,
    QUANTIZATIONS,
    Plan,
    PlanError,
    StageSpec,
    dump_plan,
    load_plan,
    locate_model,
    parse_plan,
)

GOOD = """\
version: 1
name: demo
model: models/demo
dtype: auto
blocks: 6
stages:
  - blocks: "0:3"
  - blocks: 3:6
"""


def stages(*borders: int) -> tuple[StageSpec, ...]:
    return tuple(StageSpec(BlockSpan(a, b)) for a, b in pairwise(borders))


def timings() -> st.SearchStrategy[tuple[tuple[int, float], ...]]:
    durations = st.floats(1e-9, 1e6)
    return st.dictionaries(st.integers(1, 10**6), durations, min_size=1, max_size=5).map(
        lambda d: tuple(sorted(d.items()))
    )


printable = st.text(min_size=1, max_size=30).filter(lambda t: t.isprintable() and t.strip() != "")
counts = st.integers(0, 10**18)
costs = st.builds(Cost, counts, counts, counts, counts)
profiles = st.builds(
    StageProfile,
    device=printable,
    dtype=st.sampled_from(DTYPES[1:]),
    measured=st.dates().map(str),
    load_s=st.floats(1e-9, 1e6),
    decode_s=timings(),
    prefill_s=timings(),
    memory_bytes=counts,
    device_memory_bytes=counts,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    figures = st.none() | costs, st.none() | profiles
    return Plan(
        draw(
            printable
            | st.sampled_from(["demo", "true", "3", "1e3", "null", "~", "owner/name@main", "#x", ": -", "0:3"])
        ),
        draw(printable | st.sampled_from(["yes", "2001-01-01", "'", '"', "\\", "0x1F", ".5", "-", "{}"])),
        tuple(replace(stage, cost=draw(figures[0]), profile=draw(figures[1])) for stage in stages(*borders)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([None, borders[-1]])),
        draw(st.sampled_from([None, "0123456789abcdef", "1234567890123456", "12345678901234e5"])),
        draw(st.sampled_from(QUANTIZATIONS)),
    )


@given(plans(), st.booleans())
def test_what_is_dumped_is_read_back(plan: Plan, with_summary: bool) -> None:
    summary = [f"about stage {i}" for i in range(len(plan.stages))] if with_summary else None
    assert parse_plan(dump_plan(plan, summary)) == plan


@given(plans())
def test_spans_of_any_plan_cover_all_blocks_once(plan: Plan) -> None:
    covered = [block for stage in plan.stages for block in range(stage.blocks.start, stage.blocks.end)]
    assert covered == list(range(plan.stages[-1].blocks.end))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), max_size=5), st.integers(1, 9))
def test_spans_are_taken_exactly_when_they_cover_all_blocks_once(pairs: list[tuple[int, int]], count: int) -> None:
    spans = [BlockSpan(start, start + length) for start, length in pairs]
    covered = [block for span in spans for block in range(span.start, span.end)]
    try:
        Plan("m", "n", tuple(map(StageSpec, spans)), block_count=count)
    except PlanError:
        assert covered != list(range(count))
    else:
        assert covered == list(range(count))


def test_a_good_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(GOOD)
    assert load_plan(file) == Plan("models/demo", "demo", stages(0, 3, 6), "auto", 6)


def test_what_may_be_left_out_has_defaults() -> None:
    plan = parse_plan('version: 1\nname: a\nmodel: b\nstages: [{blocks: "0:2"}]\n')
    assert plan == Plan("b", "a", stages(0, 2), "auto", None, None)


def test_quantisation_is_a_line_of_its_own_and_makes_another_digest() -> None:
    plan = parse_plan(GOOD)
    quantised = parse_plan(GOOD.replace("blocks: 6", "quantize: int8\nblocks: 6"))
    assert (plan.quantize, quantised.quantize) == ("none", "int8")
    assert plan.digest != quantised.digest
    assert "quantize" not in dump_plan(plan), "as earlier releases wrote it"
    with pytest.raises(PlanError, match=r"plan.yaml:5: quantize must be one of .*none.*int8, got 'int4'"):
        parse_plan(GOOD.replace("blocks: 6", "quantize: int4\nblocks: 6"))


def test_the_file_is_commented_for_people() -> None:
    text = dump_plan(Plan("demo", "demo", stages(0, 3, 6)), ["the first", "the second"])
    assert '  # 0: the first\n  - blocks: "0:3"\n  # 1: the second\n  - blocks: "3:6"\n' in text
    assert "half-open" in text
    assert "auto | float32 | bfloat16 | float16" in text


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("3:6", "2:6", 8, "0 and 1 overlap: block 2 is in both; each block must be in exactly one stage, in order"),
        ("3:6", "0:6", 8, "stages 0 and 1 overlap: blocks 0 to 2 are in both"),
        ("3:6", "5:6", 8, "stages 0 and 1 leave a gap: blocks 3 to 4 are in neither"),
        ("3:6", "4:6", 8, "stages 0 and 1 leave a gap: block 3 is in neither"),
        ('"0:3"\n  - blocks: 3:6', '"3:6"\n  - blocks: 0:3', 7, "stage 0 must start at block 0, not at 3"),
        ("3:6", "3:4\n  - blocks: 4:6\n  - blocks: 2:3", 10, "stages 2 and 3 overlap|wrong order"),
        ("3:6", "3:5", 8, "the last stage ends at 5, the model has 6 blocks; it must end at 6"),
        ("3:6", "3:7", 8, "the last stage ends at 7, the model has 6 blocks"),
        ("blocks: 6", "blocks: 1", 8, "the plan has 2 stages, the model only 1 block"),
        ("3:6", "6:3", 8, "0 <= start < end"),
        ("3:6", "3:3", 8, "0 <= start < end"),
        ("3:6", "3-6", 8, 'stage 1: blocks must be "START:END"'),
        ("3:6", "6", 8, r'stage 1: blocks must be "START:END" .* got a whole number \(6\)'),
        ("3:6", "[3, 6]", 8, "got a list"),
        ("3:6", "", 8, "got nothing"),
        ("3:6", "3:9999999999", 8, "more than any model has"),
        ("- blocks: 3:6", "- block: 3:6", 8, "unknown key 'block' in stage 1; known are blocks"),
        ("- blocks: 3:6", "- 3:6", 8, "stage 1 is a mapping with blocks, got text"),
        ("- blocks: 3:6", "- {}", 8, "stage 1 lacks blocks"),
        ("- blocks: 3:6", "- blocks: 3:6\n    blocks: 3:6", 9, "blocks is given twice, first in line 8"),
        ("- blocks: 3:6", "\t- blocks: 3:6", 8, "a tab; YAML is indented with spaces only"),
        ('stages:\n  - blocks: "0:3"\n  - blocks: 3:6', "stages: []", 6, "stages is empty"),
        ('stages:\n  - blocks: "0:3"\n  - blocks: 3:6', "stages: 2", 6, "stages is a list"),
        ("version: 1", "version: 2", 1, "version 2 is not known; this release reads version 1"),
        ("version: 1", "version: one", 1, "version must be a whole number"),
        ("version: 1\n", "", 1, "a plan lacks version; it needs version, name, model, stages"),
        ("name: demo", "names: demo", 2, "unknown key 'names' in a plan; known are version, name, model, dtype"),
        ("name: demo", "name: 7", 2, r'name must be text, got a whole number \(7\); write it in quotes: "7"'),
        ("name: demo", "name: true", 2, "name must be text, got true or false"),
        ("name: demo", "name: ''", 2, "name must be text that can be printed"),
        ("name: demo", 'name: "a\\nb"', 2, "name must be text that can be printed"),
        ("name: demo", "name: [a]", 2, "name must be text, got a list"),
        ("name: demo", "name: demo\nname: other", 3, "name is given twice, first in line 2; keep one"),
        ("name: demo", "? [a, b]\n: c", 2, "unknown key 'a list'"),
        ("name: demo", "name: *nobody", 2, "undefined alias"),
        ("name: demo", "name: a: b", 2, "mapping values are not allowed"),
        ("dtype: auto", "dtype: int8", 4, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("dtype: auto", "fingerprint: xyz", 4, "fingerprint must be 16 hexadecimal digits"),
        ("blocks: 6", "blocks: 0", 5, "blocks must be at least 1"),
        ("blocks: 6", "blocks: -6", 5, "blocks must be a whole number"),
        ("blocks: 6", "blocks: 6.0", 5, "blocks must be a whole number in 0..1000000, got a number with a fraction"),
        ("blocks: 6", "blocks: 99999999999", 5, "blocks must be a whole number"),
    ],
)  # fmt: skip
def test_a_slip_is_named_with_its_line(old: str, new: str, line: int, said: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    assert GOOD.count(old) == 1
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(PlanError, match=said) as caught:
        load_plan(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert "\n" not in str(caught.value)


FIGURES = """\
version: 1
name: demo
model: demo
stages:
  - blocks: "0:3"
    cost: {parameters: 9, weight_bytes: 36, kv_bytes_per_token: 4, flops_per_token: 18}
    profile:
      device: cpu, 2 threads
      dtype: float32
      measured: 2026-11-24
      load_s: 3.5
      decode_ms: {1: 5.2, 8: 9}
      prefill_ms:
        128: 30.1
        512: 99.25
      memory_bytes: 1000
"""
PROFILE = StageProfile(
    device="cpu, 2 threads", dtype="float32", measured="2026-11-24", load_s=3.5, decode_s=((1, 0.0052), (8, 0.009)),
    prefill_s=((128, 0.0301), (512, 0.09925)), memory_bytes=1000,
)  # fmt: skip


def test_figures_are_read_in_seconds() -> None:
    stage = parse_plan(FIGURES).stages[0]
    assert stage == StageSpec(BlockSpan(0, 3), Cost(9, 36, 4, 18), PROFILE)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("cost: {parameters: 9, ", "cost: {", 6, "cost of stage 0 lacks parameters; it needs parameters, weight_bytes"),
        ("parameters: 9", "params: 9", 6, "unknown key 'params' in cost of stage 0; known are parameters, weight_b"),
        ("parameters: 9", "parameters: -9", 6, "stage 0: parameters must be a whole number in 0..1000000000000000000"),
        ("parameters: 9", "parameters: many", 6, r"parameters must be a whole number .* got text \(many\)"),
        ("parameters: 9", "parameters: 9.5", 6, "parameters must be a whole number"),
        ("parameters: 9", "parameters: 1000000000000000001", 6, "parameters must be a whole number"),
        ("profile:", "profiles:", 7, "unknown key 'profiles' in stage 0; known are blocks, cost, profile"),
        ("      load_s: 3.5\n", "", 8, "profile of stage 0 lacks load_s; it needs device, dtype, measured, load_s"),
        ("device: cpu, 2 threads", "device: 2", 8, r'device must be text, got a whole number \(2\); write it in'),
        ("device: cpu, 2 threads", "device: ' '", 8, "stage 0: device must be text that can be printed"),
        ("2026-11-24", "yesterday", 10, "stage 0: measured must be a day such as 2026-11-24, got 'yesterday'"),
        ("2026-11-24", "2026-02-30", 10, "measured must be a day"),
        ("2026-11-24", "2026-11-24T10:00:00Z", 10, "measured must be a day"),
        ("load_s: 3.5", "load_s: 0", 11, "stage 0: load_s must be above 0 s and at most 1,000,000 s, got 0"),
        ("load_s: 3.5", "load_s: -1", 11, "stage 0: load_s must be a number, such as 5.2"),
        ("load_s: 3.5", "load_s: .inf", 11, "load_s must be a number"),
        ("load_s: 3.5", "load_s: .nan", 11, "load_s must be a number"),
        ("load_s: 3.5", "load_s: fast", 11, r"load_s must be a number, .* got text \(fast\)"),
        ("{1: 5.2, 8: 9}", "5.2", 12, r"stage 0: decode_ms is a mapping of widths to milliseconds, such as .*got a n"),
        ("{1: 5.2, 8: 9}", "{}", 12, "decode_ms is empty; it has at least one width and its duration"),
        ("{1: 5.2, 8: 9}", "{8: 5.2, 1: 9}", 12, "stage 0: decode_ms: widths must grow, 1 stands after 8"),
        ("{1: 5.2, 8: 9}", "{1: 5.2, 1: 9}", 12, "widths must grow, 1 stands after 1"),
        ("{1: 5.2, 8: 9}", "{0: 5.2}", 12, "decode_ms: a width must be a whole number in 1..1000000"),
        ("{1: 5.2, 8: 9}", "{a: 5.2}", 12, r"a width must be a whole number .* got text \(a\)"),
        ("{1: 5.2, 8: 9}", "{[1]: 5.2}", 12, "a width must be a whole number .* got a list"),
        ("{1: 5.2, 8: 9}", "{1: 0.0}", 12, "stage 0: decode_ms at 1 must be above 0 s"),
        ("512: 99.25", "12: 99.25", 15, "stage 0: prefill_ms: widths must grow, 12 stands after 128"),
        ("512: 99.25", "512: slow", 15, r"prefill_ms at 512 must be a number, .* got text \(slow\)"),
        ("memory_bytes: 1000", "memory_bytes: 1GiB", 16, "stage 0: memory_bytes must be a whole number"),
        ("memory_bytes: 1000", "memory_bytes: 1\n      device_memory_bytes: -1", 17, "device_memory_bytes must be a"),
    ],
)  # fmt: skip
def test_a_slip_in_figures_is_named_with_its_line(old: str, new: str, line: int, said: str) -> None:
    assert FIGURES.count(old) == 1
    with pytest.raises(PlanError, match=said) as caught:
        parse_plan(FIGURES.replace(old, new), "my.yaml")
    assert str(caught.value).startswith(f"my.yaml:{line}: ")
    assert "\n" not in str(caught.value)


def test_figures_are_written_for_people() -> None:
    text = dump_plan(parse_plan(FIGURES))
    assert "    cost: {parameters: 9, weight_bytes: 36, kv_bytes_per_token: 4, flops_per_token: 18}\n" in text
    assert "      decode_ms: {1: 5.2, 8: 9}  # sequences in a step" in text
    assert "remove them where you move a border" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "# cost" not in dump_plan(Plan("demo", "demo", stages(0, 3, 6))), "nothing is explained that is not there"


@pytest.mark.parametrize(
    "values",
    [
        {"device": ""},
        {"dtype": "\n"},
        {"measured": "2026-13-01"},
        {"load_s": 0.0},
        {"load_s": float("nan")},
        {"decode_s": ()},
        {"decode_s": ((1, 1e7),)},
        {"prefill_s": ((2, 1.0), (1, 1.0))},
        {"memory_bytes": -1},
        {"device_memory_bytes": 10**19},
    ],
)
def test_a_profile_is_checked_when_built(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(values))}"):
        replace(PROFILE, **values)  # type: ignore[arg-type]  # wrong on purpose


def test_a_cost_is_checked_when_built() -> None:
    with pytest.raises(ValueError, match=r"weight_bytes must be a whole number in 0\.\.\d+, got -1"):
        Cost(1, -1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty; a plan has version, name, model, stages"),
        (b"# only a comment\n", "is empty"),
        (b"- 1\n", ":1: a plan is a mapping with version, .* got a list"),
        (b"just words", ":1: a plan is a mapping with version, .* got text"),
        (b"a: 1\n\xff\n", ":2: not UTF-8 text"),
        (b"a: \x00", "is not YAML"),
        (b"a: [1,", "not YAML"),
        (b"[" * 20_000, "is not YAML"),
        (b"a: 1\n---\na: 2\n", ":2: .*single document"),
        (b"#" * (1 << 21), "larger than 1 MiB"),
    ],
)
def test_what_is_no_plan_at_all_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(data)
    with pytest.raises(PlanError, match=said) as caught:
        load_plan(file)
    assert str(caught.value).startswith(str(file))


@given(st.text(max_size=60) | st.text("version:name0123 -[]{}\n\t\"'#&*!|>%@`", max_size=80))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        parse_plan(text)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.yaml: no such file; `stagecraft plan"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        load_plan(tmp_path)


def test_the_digest_tells_stages_that_fit_from_stages_that_do_not() -> None:
    plan = Plan("demo", "demo", stages(0, 3, 6), "float32", 6, "0123456789abcdef")
    others = [
        replace(plan, stages=stages(0, 2, 6)),
        replace(plan, stages=stages(0, 6)),
        replace(plan, dtype="float16"),
        replace(plan, fingerprint="f" * 16),
        replace(plan, fingerprint=None),
        replace(plan, fingerprint=None, model="other"),
    ]
    assert len({p.digest for p in [plan, *others]}) == 7
    assert len(plan.digest) == 16
    assert int(plan.digest, 16) >= 0
    first = replace(plan.stages[0], cost=Cost(1, 2, 3, 4), profile=PROFILE)
    assert replace(plan, stages=(first, plan.stages[1])).digest == plan.digest, "figures do not change the cut"
    assert replace(plan, model="s3://elsewhere/demo", name="other").digest == plan.digest, "the same model, moved"


def test_a_model_beside_the_plan_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "mine").mkdir()
    (tmp_path / "plans" / "plan.yaml").write_text(GOOD.replace("models/demo", "mine"))
    monkeypatch.chdir(tmp_path)
    assert load_plan("plans/plan.yaml").model == str(tmp_path / "plans" / "mine")


@pytest.mark.parametrize("model", ["demo", "owner/name@main", "s3://bucket/x", "/absolute/x", "models/elsewhere"])
def test_a_model_that_is_not_beside_the_plan_file_stays(model: str, tmp_path: Path) -> None:
    assert locate_model(model, tmp_path) == model


def test_a_dotted_path_is_always_meant_from_the_plan_file(tmp_path: Path) -> None:
    assert locate_model("./x", tmp_path) == str(tmp_path / "x")
    assert Path(locate_model("../x", tmp_path)).resolve() == tmp_path.parent / "x"


@pytest.mark.parametrize(
    "values", [{"name": ""}, {"model": " "}, {"dtype": "int8"}, {"stages": ()}, {"block_count": 7}]
)
def test_a_plan_is_checked_when_built(values: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Plan(**{"model": "m", "name": "n", "stages": stages(0, 3, 6), **values})  # type: ignore[arg-type]
