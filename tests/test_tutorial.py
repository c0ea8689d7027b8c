"""docs/tutorial.md is its own script: its files fit together, its commands run, and no output is missing."""

import json
import sys
from pathlib import Path

import pytest

from unlearn_peft import load_recipe
from unlearn_peft.training.examples.build import read_sets

ROOT = Path(__file__).parent.parent
SERVER = """
import http.server, socketserver
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b"" if self.path == "/readyz" else b"asked")
    def log_message(self, *args): ...
with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
    print(f"at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
"""


@pytest.fixture
def tutorial(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tutorial

    return tutorial


def test_the_pages_files_fit_together(tutorial, tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    files = dict(tutorial.FILE.findall(text))
    assert len(files) == text.count("`:\n\n```") == 7
    for name, content in {**files, "retain.jsonl": files["near.jsonl"]}.items():
        (tmp_path / name).write_text(content)
    rows = read_sets(load_recipe(tmp_path / "telephone.yaml"))
    asked = {name: {row["prompt"] for row in part} for name, part in rows.items()}
    assert not asked["probes"] & (asked["forget"] | asked["retain"])
    assert not asked["neighbours"] & (asked["forget"] | asked["retain"])
    assert all(row["leak"] for row in rows["probes"])
    for row in rows["retain"]:  # the fact's words would become common words
        assert "Bell" not in json.dumps(row) and "telephone" not in json.dumps(row)


def test_no_output_is_missing(tutorial):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = tutorial.CONSOLE.findall(text)
    assert len(blocks) == text.count("```console")
    for block in blocks:
        assert not block.splitlines()[-1].startswith("$ "), f"not run yet: python benchmarks/tutorial.py\n{block}"
    assert "TO BE WRITTEN" not in text


def test_what_is_printed_comes_under_each_command(tutorial, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "`one.txt`:\n\n```\na demo\n```\n\n"
        "```console\n$ cat one.txt\nold\n$ false || printf '10%%|#\\r100%%|##\\nb\\n' >&2\n```\n\n"
        "between\n\n```console\n$ true\nold\n```\n"
    )
    command = ["tutorial.py", "--page", page, "--folder", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    tutorial.main()
    printed = "```console\n$ cat one.txt\na demo\n\n$ false || printf '10%%|#\\r100%%|##\\nb\\n' >&2\nb\n```\n"
    assert printed in page.read_text() and page.read_text().endswith("```console\n$ true\n```\n")
    once = page.read_text()
    tutorial.main()
    assert page.read_text() == once


def test_a_command_that_fails_ends_it_and_a_server_is_stopped(tutorial, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    ask = "curl -s $(grep -o 'http://[0-9.:]*' server.log)/other"
    block = f"$ {sys.executable} server.py &\n$ {ask}\n"
    assert tutorial.run_block(block, tmp_path, "demo").endswith(f"$ {ask}\nasked\n")
    with pytest.raises(SystemExit, match="ended with 7"):
        tutorial.run_block(f"{block}$ exit 7\n", tmp_path, "demo")
    with pytest.raises(SystemExit, match="was not ready"):
        tutorial.run_block("$ echo no &\n", tmp_path, "demo")


@pytest.mark.slow
def test_the_whole_page_on_a_tiny_model(tutorial, tiny_folder, tmp_path, monkeypatch, capsys):
    command = ["tutorial.py", "--base", tiny_folder, "--folder", tmp_path / "work", "--no-write"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    tutorial.main()
    printed = capsys.readouterr().out
    assert "bit-equal to the base: True" in printed and "['telephone']" in printed
