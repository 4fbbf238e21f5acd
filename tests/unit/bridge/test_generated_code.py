"""The generated code of the gRPC services is that of their contracts."""

import subprocess
from pathlib import Path

from workers.environment import ROOT

CODE = ROOT / "bridge" / "grpc" / "wire"


def test_generating_the_code_again_gives_the_same_files(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "protos", f"OUT={tmp_path}"], cwd=ROOT, check=True)

    generated = {file.name: file.read_text() for file in tmp_path.glob("bridge/grpc/wire/*.py*")}
    committed = {file.name: file.read_text() for file in CODE.glob("*_pb2*.py*")}
    assert len(generated) == 15
    assert generated.keys() == committed.keys()
    assert [name for name, code in generated.items() if code != committed[name]] == []
