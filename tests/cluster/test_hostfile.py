"""`deepspeed --hostfile` over pdsh and ssh to two addresses of this host, each with an sshd of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ranks import started
from tests.distributed import free_port
from tests.train.launched import ROOT, losses

ADDRESSES = ("127.0.0.2", "127.0.0.3")
PATH = os.environ["PATH"] + ":/usr/sbin"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which pdsh reaches both addresses; skips where it cannot."""
    if missing := [name for name in ("pdsh", "sshd", "ssh-keygen") if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install pdsh openssh-server")
    if os.geteuid() != 0:
        pytest.skip("a private sshd needs root")
    Path("/run/sshd").mkdir(exist_ok=True)
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    (folder / "config").write_text(
        "".join(f"ListenAddress {address}:{port}\n" for address in ADDRESSES)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile {folder}/pid\nStrictModes no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\n"
    )
    daemon = subprocess.Popen([shutil.which("sshd", path=PATH) or "", "-D", "-e", "-f", folder / "config"])
    try:
        ssh = (
            f"-p {port} -i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        )
        deadline = time.monotonic() + 20
        while (done := subprocess.run(["ssh", *ssh.split(), f"{getpass.getuser()}@{ADDRESSES[1]}", "true"])).returncode:
            if time.monotonic() > deadline:
                pytest.skip(f"sshd does not answer here (status {done.returncode})")
            time.sleep(0.3)
        yield {**os.environ, "PATH": PATH, "PDSH_SSH_ARGS_APPEND": ssh}
    finally:
        daemon.terminate()
        daemon.wait()


@pytest.mark.timeout(250)
def test_two_hosts_train_like_one_and_get_the_environment(hosts: dict[str, str], inputs: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    names = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in names.items()))
    output = tmp_path / "run"
    words = ["deepspeed", "--hostfile", hostfile, "--no_ssh_check", "--master_addr", ADDRESSES[0], "--master_port"]
    words += [free_port(), "launch/pretrain.py", "--ds_config", inputs / "zero2.json", "--recipe"]
    words += [inputs / "launched.py", "--output", output, "--resume", "auto"]
    done = subprocess.run(
        [*map(str, words)],
        cwd=ROOT, env={**hosts, "DS_ENV_FILE": str(tmp_path / "env"), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = done.stdout + done.stderr
    assert "gloo over lo (GLOO_SOCKET_IFNAME), first node 127.0.0.2" in printed, printed[-3000:]
    with started(tmp_path / "logs", inputs, tmp_path / "one") as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
    assert losses(output) == losses(tmp_path / "one")
