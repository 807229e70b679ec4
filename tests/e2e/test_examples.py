"""What README and examples/ show runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.brokers import ROOT, RunningBroker

WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {}}}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_readmes_client(broker: RunningBroker, tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    assert len(block.group(1).strip().splitlines()) <= 15
    (tmp_path / "workflow_api.json").write_text(json.dumps(WORKFLOW), encoding="utf-8")
    script = block.group(1).replace("http://127.0.0.1:8770", broker.url)
    (tmp_path / "client.py").write_text(script, encoding="utf-8")
    done = run("client.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "filename" in done.stdout
    assert broker.status()["leases"] == []


def test_the_example_saves_the_picture(broker: RunningBroker, tmp_path: Path) -> None:
    (tmp_path / "workflow_api.json").write_text(json.dumps(WORKFLOW), encoding="utf-8")
    script = str(ROOT / "examples" / "imagen.py")
    done = run(script, "workflow_api.json", broker.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = tmp_path / done.stdout.split()[-1]
    assert saved.read_bytes().startswith(b"\x89PNG")
    assert run(script, cwd=tmp_path).returncode == 2
    assert "No such file" in run(script, "nowhere.json", broker.url, cwd=tmp_path).stderr
