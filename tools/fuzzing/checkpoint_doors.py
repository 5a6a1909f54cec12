"""Checkpoints of strangers: configuration, headers and index of the weights, tokenizer and chat template.

An input is a folder as JSON: file names to texts, or to {"base64": ...} for weights. Read as planning and serving read
it; one in so many of those whose headers are in order is loaded as a stage loads it."""

from __future__ import annotations

import base64
import gc
import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from functions.contract.checkpoint import CheckpointError, open_checkpoint, read_tensor
from functions.contract.errors import NotReady
from functions.service import StageService
from functions.settings import StageSettings
from orchestrator.chat import ChatTemplate, ChatTemplateError
from orchestrator.plan import PlanError, dump_plan, parse_plan
from orchestrator.planner import check_plan, model_cost, plan_by_stages, summary
from orchestrator.tokenizer import TokenizerError, load_tokenizer
from tools.fuzzing.door import Verdict, Violation
from tools.fuzzing.mutations import TEXTS, changed_value, dumped, hostile, mutated, mutated_json, mutated_text
from tools.fuzzing.tensors import mutated_tensors

_READ_BYTES_MAX = 1 << 20
_ADDRESSES_BYTES_MAX = 12 << 30
_TEMPLATE_WORDS = ("{% for m in messages %}", "{% endfor %}", "{{ messages }}", "{{ ''.__class__ }}", "{% if %}", "{{",
                   "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ range(10) | list }}", "{% include 'x' %}",
                   "{% set x = [] %}", "| tojson", "{{ raise_exception('no') }}", "{{ 1/0 }}",
                   "{{ strftime_now('%Q') }}", "{{ messages[9].content }}", "{{ (1).__add__ }}", "{% generation %}",
                   "{{ lipsum() }}", "{{ '%x' % 'a' }}", "{{ [] + 1 }}", "{{ namespace(a=1).b.c }}", "{{ 'a' * 1000 }}",
                   "{{ none.x }}",
                   "{% break %}", "{{ messages | map(attribute='__init__') | list }}", "{{ 'a'.encode('xyz') }}",
                   "{{ '{0.__class__}'.format(1) }}", "{{ messages | groupby('role') }}", "{{ {}['a'] }}")  # fmt: skip


class CheckpointDoor:
    """`models` are good checkpoints; `folder` is where the hostile ones are written."""

    name = "checkpoints"

    def __init__(self, models: Sequence[Path], folder: Path) -> None:
        self._folder = folder
        self._good = [
            {file.name: file.read_bytes() for file in sorted(model.iterdir()) if file.is_file()} for model in models
        ]

    def make(self, random: Random) -> bytes:
        files: dict[str, Any] = dict(random.choice(self._good))
        if not random.randrange(4):
            index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
            files["model.safetensors.index.json"] = json.dumps(index).encode()
        name = random.choice([*sorted(files), "config.json", "model.safetensors", "chat_template.jinja"])
        data = files[name]
        if random.random() < 0.05:
            del files[name]
        elif name.endswith(".safetensors"):
            files[name] = mutated_tensors(random, data) if random.random() < 0.8 else data[: random.randrange(200)]
        elif name.endswith(".jinja"):
            text = mutated_text(random, data.decode(), (*_TEMPLATE_WORDS, *TEXTS[:20]))
            files[name] = text.encode(errors="replace")
        elif "index" in name:
            files[name] = dumped(
                {"weight_map": {"a": random.choice((*TEXTS[:30], "model.safetensors", hostile(random)))}}
            )
        elif random.random() < 0.1:
            files[name] = mutated(random, data)
        else:
            files[name] = mutated_json(random, _changed(random, json.loads(data)))
        return json.dumps({name: base64.b64encode(data).decode() for name, data in files.items()}).encode()

    def take(self, data: bytes) -> Verdict:
        files = json.loads(data)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        for name, text in files.items():
            (self._folder / name).write_bytes(base64.b64decode(text))
        return "accepted" if self.given() else "refused"

    def given(self) -> bool:
        """What is done with the checkpoint in the folder; whether all of it is in order."""
        served = self._tokenizer()
        return self._weights() and served

    def check(self) -> None:
        for files in self._good:
            encoded = {name: base64.b64encode(data).decode() for name, data in files.items()}
            if self.take(json.dumps(encoded).encode()) != "accepted":
                raise Violation("harm", f"a good checkpoint is refused: {files['config.json'].decode()}")

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _weights(self) -> bool:
        try:
            checkpoint = open_checkpoint(str(self._folder))
            plan = plan_by_stages(checkpoint, 2, name="m")
            check_plan(parse_plan(dump_plan(plan, summary(plan, model_cost(checkpoint)))), checkpoint)
            for info in list(checkpoint.tensors.values())[:3]:
                if info.nbytes <= _READ_BYTES_MAX:
                    read_tensor(checkpoint, info, memoryview(bytearray(info.nbytes)))
        except (CheckpointError, PlanError) as error:
            _expect_words(error)
            return False
        return True

    def _tokenizer(self) -> bool:
        try:
            tokenizer = load_tokenizer(str(self._folder))
            if tokenizer.backend is not None:
                ids = tokenizer.encode("To be, or not to be é🙂")
                tokenizer.decode(ids)
                for token in (0, 1, *ids[:2], 10**6):
                    tokenizer.token_text(token)
                    tokenizer.is_special(token)
            if tokenizer.chat_template is not None:
                template = ChatTemplate(tokenizer.chat_template, tokenizer.special)
                template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
        except (TokenizerError, ChatTemplateError, CheckpointError) as error:
            _expect_words(error)
            return False
        return True


class LoadingDoor(CheckpointDoor):
    """The same checkpoints loaded as a stage loads them. Whatever goes wrong there ends the stage with a reason; here
    it counts that the process lives, ends in time, and takes no more memory than there is."""

    name = "stage-loading"

    def __init__(self, models: Sequence[Path], folder: Path) -> None:
        super().__init__(models, folder)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES_BYTES_MAX, _ADDRESSES_BYTES_MAX))

    def given(self) -> bool:
        settings = StageSettings(
            model=str(self._folder), blocks="1:3", index=1, count=3, kv_bytes_max=1 << 20, threads=1, model_wait_s=0
        )
        service = StageService(settings)
        service.start()
        loading = service._loading
        assert loading is not None
        try:
            loading.result()
        except NotReady as error:
            _expect_words(error)
            return False
        finally:
            gc.collect()  # models have cycles
        return True


def _changed(random: Random, value: Any) -> Any:
    """Of a tokenizer only the parts beside its long lists, mostly; they are where meaning is."""
    if isinstance(value, dict) and "model" in value and random.random() < 0.8:
        part = random.choice([name for name in sorted(value) if name != "model"])
        return {**value, part: changed_value(random, value[part])}
    return value


def _expect_words(error: Exception) -> None:
    if not str(error) or "Traceback" in str(error):
        raise Violation("crash", f"{type(error).__name__} says nothing that helps: {error}") from error
