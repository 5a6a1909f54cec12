"""Which objects a folder holds, in what order, and what is said of files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from knative.errors import ValidationError
from orchestrator.cluster import read_objects

ACCOUNT = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {0}, namespace: models}}\n"
KUSTOMIZATION = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"

Lay = Callable[..., Path]


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """lay(a=text, ...) writes a.yaml, ..."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def problems(*paths: Path) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        read_objects(paths)
    return list(caught.value.problems)


def test_a_kustomization_says_which_files_and_in_what_order(lay: Lay) -> None:
    listed = f"{KUSTOMIZATION}resources: [b.yaml, a.yaml]\n"
    folder = lay(a=ACCOUNT.format("a"), b=ACCOUNT.format("b"), unlisted="not: [read", kustomization=listed)
    assert [str(one) for one in read_objects([folder])] == ["serviceaccount/b", "serviceaccount/a"]


def test_without_a_kustomization_it_is_all_files_by_name(lay: Lay) -> None:
    folder = lay(b=ACCOUNT.format("b"), a=f"{ACCOUNT.format('a1')}---\n{ACCOUNT.format('a2')}")
    assert [one.name for one in read_objects([folder])] == ["a1", "a2", "b"]


def test_files_and_folders_can_be_mixed(lay: Lay, tmp_path: Path) -> None:
    folder = lay(a=ACCOUNT.format("a"))
    other = tmp_path.parent / f"{tmp_path.name}-other.yaml"
    other.write_text(ACCOUNT.format("other"))
    assert [one.name for one in read_objects([other, folder])] == ["other", "a"]


def test_an_object_without_a_namespace_gets_that_of_the_kustomization(lay: Lay) -> None:
    bare = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: bare}\n"
    folder = lay(bare=bare, kustomization=f"{KUSTOMIZATION}namespace: models\nresources: [bare.yaml]\n")
    (one,) = read_objects([folder])
    assert one.namespace == "models"


def test_everything_that_is_wrong_is_told_with_its_line(lay: Lay) -> None:
    folder = lay(
        broken="a: [1,\nb: }\n",
        twice=f"{ACCOUNT.format('one')}---\n{ACCOUNT.format('one')}",
        unnamed="apiVersion: v1\nkind: ConfigMap\nmetadata:\n  namespace: x\n",
    )
    found = problems(folder / "broken.yaml", folder / "twice.yaml", folder / "unnamed.yaml", folder / "absent.yaml")
    assert [text.split(": ")[0] for text in found] == [
        f"{folder}/broken.yaml:2",
        f"{folder}/unnamed.yaml:3",
        f"{folder}/absent.yaml",
        f"{folder}/twice.yaml:5",
    ]
    assert found[1].endswith("missing field: metadata.name")
    assert found[3].endswith(f"given twice, first at {folder}/twice.yaml:1")


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("resources: [a.yaml, gone.yaml]\n", "there is no file"),
        ("resources: a.yaml\n", "expected a list of file names"),
        ("resources: [.]\n", "there is no file"),
        ("resources: [a.yaml]\npatches: [{path: p.yaml}]\n", "use kubectl apply -k"),
        ("namespace: elsewhere\nresources: [a.yaml]\n", "render it again with --namespace elsewhere"),
    ],
)
def test_what_kustomize_could_do_and_this_does_not_is_refused(lay: Lay, rest: str, complaint: str) -> None:
    folder = lay(a=ACCOUNT.format("a"), kustomization=KUSTOMIZATION + rest)
    (problem,) = problems(folder)
    assert complaint in problem
    assert problem.startswith(str(folder))


def test_a_folder_without_objects_is_an_error(lay: Lay) -> None:
    assert problems(lay(kustomization=f"{KUSTOMIZATION}resources: []\n"))[0].startswith("there are no objects in")
