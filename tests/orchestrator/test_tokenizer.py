"""Ids and chat texts equal those of Transformers, without importing it (or torch) in the orchestrator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.chat import ChatTemplate, ChatTemplateError
from orchestrator.tokenizer import TokenizerError, load_tokenizer

TEXTS = ["To be, or not to be", "  spaces  ", "naïve 你好 🙂", "", "<s>special</s> text", "line\nline", "x" * 200]
CHATS = {
    "one": [{"role": "user", "content": "To be?"}],
    "three": [
        {"role": "system", "content": " You are a poet. "},
        {"role": "user", "content": "naïve 你好"},
        {"role": "assistant", "content": "or not"},
    ],
}
TEMPLATES = {
    "whitespace control": "{%- for m in messages %}\n  {{- m.content }}\n{%- endfor %}\n {% if 1 %}\n x\n  {% endif %}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ {'a': '<&>'} | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = m.role %}{% endfor %}{{ ns.x }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "absent tools": "{% if tools %}T{% endif %}{% if documents is none %}N{% endif %}{{ bos_token }}{{ eos_token }}",
    "date": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "generation prompt": "{{ messages[0].content }}{% if add_generation_prompt %}>>{% endif %}",
}


@pytest.fixture(params=["byte_level_folder", "sentencepiece_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_equal_those_of_transformers(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs(text, truncation=False)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_read_as_transformers_renders_them(folder: Path, template: str, chat: list, prompt: bool) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    ours = ChatTemplate(template, load_tokenizer(str(folder)).special)
    assert ours.render(chat, add_generation_prompt=prompt) == expected


def test_the_checkpoints_own_template_gives_the_ids_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(folder))
    assert ours.chat_template is not None
    text = ChatTemplate(ours.chat_template, ours.special).render(CHATS["three"])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHATS["three"], add_generation_prompt=True, return_dict=False
    )
    assert ours.encode(text, add_special_tokens=False) == theirs


PARTS = [{"role": "user", "content": [{"type": "text", "text": "to "}, {"type": "text", "text": "be"}]}]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("{{ messages[0].content }}", PARTS, "to be"),
        ("{% for p in messages[0].content %}{{ p.text }}|{% endfor %}", PARTS, "to |be|"),
        ("{% for p in messages[0].content %}{{ p.text }}|{% endfor %}", CHATS["one"], "To be?|"),
        ("{{ messages[0].content | trim }}", PARTS, "to be"),
    ],
)
def test_content_is_given_in_the_form_that_the_template_takes(template: str, messages: list, expected: str) -> None:
    assert ChatTemplate(template, {}).render(messages) == expected


def test_a_template_that_refuses_is_quoted() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(CHATS["one"])


@pytest.mark.parametrize(
    "attack", ["{{ ''.__class__.__mro__ }}", "{% set _ = messages.append(1) %}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    try:
        text = ChatTemplate(attack, {}).render(CHATS["one"])
    except ChatTemplateError:
        return
    assert "class" not in text
    assert "os" not in text


def test_a_broken_template_is_told() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})


def test_end_ids_come_from_generation_config_and_the_tokenizer(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_tokenizer(str(tmp_path)).eos_ids == {7, 9, 1}
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 8}}))
    assert load_tokenizer(str(tmp_path)).eos_ids == {8, 1}


def test_named_templates_in_the_tokenizers_configuration(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(str(tmp_path)).chat_template == "D"


def test_without_tokenizer_json_ids_work_and_text_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([1, 2]) == ""
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json.*send token ids"):
        tokenizer.encode("text")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{")
    with pytest.raises(TokenizerError, match=file):
        load_tokenizer(str(tmp_path))


def test_parts_that_do_not_fit_together_are_told(byte_level_folder: Path, tmp_path: Path) -> None:
    """The library panics, which is no ordinary exception and would end a server."""
    given = json.loads((byte_level_folder / "tokenizer.json").read_text())
    given["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not in order: tokenizers cannot use it \(.+\); save"):
        load_tokenizer(str(tmp_path)).encode("To be")


def test_half_a_surrogate_pair_is_no_special_token(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    assert "eos_token" not in load_tokenizer(str(tmp_path)).special


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a'.encode('xyz') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
    ids=["an encoding that is none", "calls without an end", "brackets without an end"],
)
def test_whatever_a_template_raises_is_told(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])


def test_half_a_surrogate_pair_is_refused(byte_level_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="Unicode"):
        load_tokenizer(str(byte_level_folder)).encode("a\ud800")


def test_tokens_are_spelled_as_bytes(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(" 🙂 naïve", add_special_tokens=False)
    spelled = b"".join(tokenizer.token_bytes(token) or b"" for token in ids)
    assert spelled.decode().strip() == "🙂 naïve"


def test_the_orchestrator_never_imports_torch(byte_level_folder: Path) -> None:
    code = (
        "import sys\n"
        "import orchestrator.server as s\n"
        "with s.bare_argv():\n"
        "    import orchestrator.kserve_model, orchestrator.generate_api, kserve.model_server\n"
        "from orchestrator.tokenizer import load_tokenizer\n"
        "load_tokenizer(sys.argv[1]).encode('text')\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(byte_level_folder), "--workers", "not-a-number"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.stdout.strip() == "[]", result.stderr
