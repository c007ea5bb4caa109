"""The digest names the tokenizer and the chat template, wherever their folder lies."""

from __future__ import annotations

from pathlib import Path

from replicas.supervisor.tokenizer_digest import tokenizer_digest


def make_folder(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_equal_files_have_equal_digests_wherever_they_lie(tmp_path: Path) -> None:
    a = make_folder(tmp_path / "a", tokenizer__json="{}", chat_template__jinja="x")
    b = make_folder(tmp_path / "b", tokenizer__json="{}", chat_template__jinja="x", README__md="other")
    assert tokenizer_digest(a) == tokenizer_digest(b)
    assert len(tokenizer_digest(a)) == 32


def test_another_template_is_another_digest(tmp_path: Path) -> None:
    a = make_folder(tmp_path / "a", tokenizer__json="{}", chat_template__jinja="x")
    b = make_folder(tmp_path / "b", tokenizer__json="{}", chat_template__jinja="y")
    assert tokenizer_digest(a) != tokenizer_digest(b)


def test_additional_templates_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", tokenizer__json="{}")
    before = tokenizer_digest(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("t")
    assert tokenizer_digest(folder) != before


def test_bytes_moved_between_files_change_the_digest(tmp_path: Path) -> None:
    a = make_folder(tmp_path / "a", tokenizer__json="ab", tokenizer_config__json="c")
    b = make_folder(tmp_path / "b", tokenizer__json="a", tokenizer_config__json="bc")
    assert tokenizer_digest(a) != tokenizer_digest(b)


def test_no_tokenizer_is_an_empty_digest(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path) == ""
    assert tokenizer_digest(tmp_path / "missing") == ""
