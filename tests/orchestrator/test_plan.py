"""Plan files: what is written is read back, and every slip of an editing hand is named with its line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.spans import BlockSpan
from orchestrator.plan import DTYPES, Plan, PlanError, StageSpec, dump_plan, load_plan, locate_model, parse_plan

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


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    text = st.text(min_size=1, max_size=30).filter(lambda t: t.isprintable() and t.strip() != "")
    return Plan(
        draw(text | st.sampled_from(["demo", "true", "3", "1e3", "null", "~", "owner/name@main", "#x", ": -", "0:3"])),
        draw(text | st.sampled_from(["yes", "2001-01-01", "'", '"', "\\", "0x1F", ".5", "-", "{}"])),
        stages(*borders),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([None, borders[-1]])),
        draw(st.sampled_from([None, "0123456789abcdef", "1234567890123456", "12345678901234e5"])),
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
