"""Where a model comes from: what a person calls MODEL becomes a place that stages can read.

    a folder            itself
    s3://..., hf://...  itself: anything that fsspec opens
    demo                the model that comes with Stagecraft
    owner/name[@rev]    a hub id; downloaded into the cache of huggingface_hub, or (to plan) read by byte ranges

Downloads obey the environment of huggingface_hub: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from functions.contract.checkpoint import INDEX_FILE, Checkpoint, CheckpointError, exists, open_checkpoint, open_file
from functions.contract.location import DEMO, DEMO_FOLDER

DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
NOT_DOWNLOADED = ["*/*", "consolidated*"]  # other formats of the same weights, and what belongs to other programs

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", re.ASCII)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WHAT_IS_A_MODEL = "MODEL is a folder with a checkpoint, a URL (s3://...), a hub id owner/name[@revision], or demo"


class ModelSourceError(Exception):
    """The model cannot be found or fetched; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`location` is what `open_checkpoint` and STAGE_MODEL take: a folder (absolute) or a URL. `name` is for clients.

    `revision` is the commit of a model from the hub, else None."""

    location: str
    name: str
    revision: str | None = None


def resolve_model(model: str) -> ResolvedModel:
    """A place that holds the whole model; one from the hub is downloaded first, unless the cache has it.

    Progress is shown on standard error when that is a terminal. Raises ModelSourceError."""
    found = _without_hub(model)
    if found is not None:
        return found
    repository, revision = _parse_hub_id(model)
    return _download(repository, revision)


def open_model(model: str) -> tuple[ResolvedModel, Checkpoint]:
    """The model's headers; of one on the hub nothing else is fetched, and `location` is its URL (hf://).

    Raises ModelSourceError, and CheckpointError for a checkpoint that is broken or lacks tensors of its index."""
    found = _without_hub(model)
    if found is None:
        repository, revision = _parse_hub_id(model)
        found = _on_hub(repository, revision)
        with _explained(repository, revision):
            checkpoint = open_checkpoint(found.location)
            check_index(checkpoint)
        return found, checkpoint
    if "://" in found.location:
        with _explained(found.location, None):
            checkpoint = open_checkpoint(found.location)
    else:
        checkpoint = open_checkpoint(found.location)
    check_index(checkpoint)
    return found, checkpoint


def check_index(checkpoint: Checkpoint) -> None:
    """Whether every tensor that the index names is in the files. Raises CheckpointError that names some missing."""
    if not exists(checkpoint.location, INDEX_FILE):
        return
    with open_file(checkpoint.location, INDEX_FILE) as stream:
        names = json.loads(stream.read())["weight_map"]  # open_checkpoint has read it before
    missing = sorted(set(names) - set(checkpoint.tensors))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.location} lacks tensors that {INDEX_FILE} names: {', '.join(missing[:3])}{more}; "
            "the checkpoint is incomplete, copy or download it again"
        )


def _without_hub(model: str) -> ResolvedModel | None:
    """The model, if it is not a hub id."""
    if not model.strip() or not model.isprintable():
        raise ModelSourceError(f"{model!r} names no model; {_WHAT_IS_A_MODEL}")
    if "://" in model:
        return ResolvedModel(model.rstrip("/"), _last_part(model))
    path = Path(os.path.abspath(os.path.expanduser(model)))
    if path.is_dir():
        return ResolvedModel(str(path), path.name or "model")
    if path.exists():
        raise ModelSourceError(f"{model} is a file; name the folder that holds it (with config.json and *.safetensors)")
    if model == DEMO:
        return _demo()
    return None


def _demo() -> ResolvedModel:
    if not DEMO_FOLDER.is_dir():
        raise ModelSourceError(
            f"the demonstration model is not in {DEMO_FOLDER}; it comes with the repository, not with the installed "
            "package: run from a checkout, or name another model"
        )
    return ResolvedModel(str(DEMO_FOLDER), DEMO)


def _parse_hub_id(model: str) -> tuple[str, str | None]:
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise ModelSourceError(f"there is no folder {model}, and it is not a hub id either; {_WHAT_IS_A_MODEL}")
    return match[1], match[2]


def _download(repository: str, revision: str | None) -> ResolvedModel:
    from huggingface_hub import snapshot_download

    with _explained(repository, revision):
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED
        )
    return ResolvedModel(folder, _last_part(repository), Path(folder).name)


def _on_hub(repository: str, revision: str | None) -> ResolvedModel:
    """The model where it lies, pinned to a commit; in the cache when the hub cannot be reached."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    with _explained(repository, revision):
        try:
            commit = HfApi().model_info(repository, revision=revision).sha
        except Exception as error:
            if not _is_unreachable(error):
                raise
            return _download(repository, revision)  # finds it in the cache, or says what is wrong
        # says at once whether the files may be read: the facts about a gated model are open to all
        get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=commit))
    return ResolvedModel(f"hf://{repository}@{commit}", _last_part(repository), commit)


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub and fsspec raise into ModelSourceError."""
    try:
        yield
    except (ModelSourceError, CheckpointError):
        raise
    except Exception as error:
        # which errors of its HTTP library come through depends on the library's release, so all are caught here
        raise ModelSourceError(_explain(error, repository, revision)) from error


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated: its files are open only to those who have accepted its terms. Accept them at "
            f"{hub}/{repository} and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"there is neither a folder {repository} nor a model of that name on {hub} that you may read; check the "
            "spelling, and for a private model set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'} on {hub}; name a branch, tag or commit after the @"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repository} on {hub} holds no config.json; it is not a model in Hugging Face format"
    if constants.HF_HUB_OFFLINE and _is_unreachable(error):
        return (
            f"{repository} is not (completely) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
            "fetch it; unset HF_HUB_OFFLINE, or point HF_HOME to a cache that has it"
        )
    if _is_unreachable(error):
        return (
            f"{hub} cannot be reached and {repository} is not (completely) in the cache {constants.HF_HUB_CACHE}; "
            "check the network and HF_ENDPOINT, or name a local folder"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return (
            f"there is no room for {repository} in {constants.HF_HUB_CACHE} ({error.strerror}); free some disk space, "
            "or set HF_HOME to a folder on another disk"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{repository} cannot be read: {reason}"


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub could not be asked at all (or only answered that it is out of order)."""
    from huggingface_hub import errors

    kinds = {kind.__name__ for kind in type(error).__mro__}  # of httpx or httpx2, by the release of huggingface_hub
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) or "TransportError" in kinds:
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status >= 500


def _last_part(text: str) -> str:
    """The name in a URL or id: s3://bucket/llama@main -> llama."""
    return text.rstrip("/").rpartition("/")[2].partition("@")[0] or "model"
