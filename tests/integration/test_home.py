"""The home and other folders in a machine; the credentials that it must not see; the SSH agent."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from berth import locks
from person import Person


def test_a_file_made_inside_is_the_users(person: Person, debian: str, project: Path) -> None:
    person.run(debian, "sh", "-c", "echo inside > made.txt; mkdir -p sub/dir; ln -s made.txt link", cwd=project)
    made = project / "made.txt"
    assert made.read_text() == "inside\n"
    assert made.stat().st_uid == person.uid
    assert person.run(debian, "stat", "-c", "%u", "hello.txt", cwd=project).strip() == str(person.uid)


def test_what_the_host_changes_is_seen_at_once(person: Person, debian: str, project: Path) -> None:
    for number in range(10):
        (project / "state").write_text(f"{number}\n" * (number + 1))
        said = person.run(debian, "sh", "-c", "cat state; ls", cwd=project)
        assert said.splitlines()[: number + 1] == [str(number)] * (number + 1)
        assert f"file-{number - 1}" in said or number == 0
        (project / f"file-{number}").touch()


def test_what_runs_sees_what_the_host_changes(person: Person, debian: str, project: Path) -> None:
    """As an editor on the host saves, by writing and by renaming, while a server in the machine reads the file."""
    (project / "page").write_text("begin\n")
    script = 'while read word < page; do [ "$word" = "$last" ] || echo "$word"; last=$word; sleep 0.05; done'
    process = person.popen("run", "-n", debian, "-w", str(project), "--", "sh", "-c", script)
    assert process.stdout
    with process:
        assert process.stdout.readline() == b"begin\n"
        for number in range(6):
            target = project / ("page" if number % 2 else "page.new")
            with target.open("r+" if target.exists() else "w") as file:  # not emptied: an empty file ends the loop
                file.write(f"{number:05}\n")
            target.replace(project / "page")
            assert process.stdout.readline() == b"%05d\n" % number
        process.kill()


def test_the_machines_root_owns_nothing_on_the_host(person: Person, debian: str, project: Path) -> None:
    if person.is_root:
        pytest.skip("needs an ordinary user: host root's home is the machine root's, by design")
    project.chmod(0o777)
    person.berth("run", "-n", debian, "--root", "--", "touch", str(project / "by-root"))
    owner = (project / "by-root").stat().st_uid
    assert owner not in (0, person.uid)


@pytest.fixture
def secrets(person: Person) -> Generator[Path]:
    """Credentials in the person's home, unless there are real ones."""
    with locks.hold(Path(f"/run/lock/berth-tests-home-{person.uid}")):  # root's is two workers' at once
        made: list[Path] = []
        for name in (".aws", ".azure"):
            folder = person.home / name
            if not folder.exists():
                folder.mkdir(mode=0o700)
                made.append(folder)
            (folder / "berth-test-secret").write_text("secret\n")
        netrc = person.home / ".netrc"
        if not netrc.exists():
            netrc.write_text("secret\n")
            made.append(netrc)
        for path in made:
            for each in (path, *path.glob("*")):
                os.chown(each, person.uid, person.home.stat().st_gid)
        yield person.home
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in (".aws", ".azure"):
            (person.home / name / "berth-test-secret").unlink(missing_ok=True)


def test_credentials_are_hidden_and_root_cannot_undo_it(
    person: Person, secrets: Path, machine: Callable[..., str]
) -> None:
    name = machine("--expose", ".azure")
    assert person.run(name, "cat", f"{secrets}/.azure/berth-test-secret") == "secret\n"
    assert person.try_berth("run", "-n", name, "--root", "--", "cat", f"{secrets}/.aws/berth-test-secret").status == 1
    assert person.berth("run", "-n", name, "--root", "--", "cat", f"{secrets}/.netrc") == ""
    attempts = (
        f"umount {secrets}/.aws", f"umount -l {secrets}/.aws", f"umount {secrets}", f"umount -l {secrets}",
        f"mount --bind {secrets} /mnt && cat /mnt/.aws/berth-test-secret",
        f"mount --rbind {secrets} /mnt && umount -l /mnt/.aws && cat /mnt/.aws/berth-test-secret",
        f"mount -t overlay overlay -o lowerdir={secrets},upperdir=/tmp,workdir=/var /mnt && cat /mnt/.aws/*",
        f"mount --move {secrets}/.aws /mnt",
        f"unshare -m umount {secrets}/.aws && cat {secrets}/.aws/berth-test-secret",
        f"unshare -Ur umount {secrets}/.aws",
        f"mv {secrets}/.aws {secrets}/other && cat {secrets}/other/berth-test-secret",
    )  # fmt: skip
    for attempt in attempts:
        script = f"{attempt}; cat {secrets}/.aws/berth-test-secret"
        done = person.try_berth("run", "-n", name, "--root", "--", "sh", "-c", script)
        assert b"secret\n" not in done.stdout, attempt
    assert (secrets / ".aws/berth-test-secret").read_text() == "secret\n"


def test_a_hidden_folder_is_the_machines_own(person: Person, secrets: Path, machine: Callable[..., str]) -> None:
    name = machine()
    person.run(name, "sh", "-c", f"echo mine > {secrets}/.aws/own")
    assert not (secrets / ".aws/own").exists()
    person.berth("restart", name)
    assert person.run(name, "cat", f"{secrets}/.aws/own") == "mine\n"


def test_berths_own_folders_are_covered(person: Person, project: Path, alpine: str, alpine_tar: Path) -> None:
    """With its data below the home, as users have it, no machine sees or writes another machine's files."""
    del alpine
    roots = {"BERTH_DATA_DIR": str(project / "data"), "BERTH_RUNTIME_DIR": str(project / "run")}
    person.berth(
        "create", f"rootfs:{alpine_tar}", "--name", "covered", "--no-boot", "--expose", str(project / "data"), env=roots
    )
    try:
        listing = person.berth("run", "-n", "covered", "--root", "--", "ls", "-A", str(project / "data"), env=roots)
        assert listing == ""
        person.berth("run", "-n", "covered", "--root", "--", "touch", str(project / "data/machines"), env=roots)
        assert (project / "data/machines").is_dir()
    finally:
        person.berth("rm", "--force", "covered", env=roots)


def test_home_read_only_and_none(person: Person, machine: Callable[..., str], project: Path) -> None:
    name = machine("--home-mount", "ro")
    assert person.run(name, "cat", "hello.txt", cwd=project) == "hello from the host\n"
    assert person.try_berth("run", "-n", name, "--root", "--", "touch", str(project / "no")).status == 1
    person.berth("set", "-n", name, "home-mount=none")
    person.berth("restart", name)
    assert person.run(name, "sh", "-c", "pwd; touch ~/own && ls -A ~", cwd=project).split()[0] == str(person.home)
    assert not (person.home / "own").exists()
    assert person.try_berth("run", "-n", name, "--", "cat", str(project / "hello.txt")).status == 1


def test_chosen_folders(person: Person, machine: Callable[..., str], project: Path) -> None:
    name = machine("--home-mount", "none", "--mount", f"{project}:/srv/project", "--mount", f"{project}:/srv/fixed:ro")
    assert person.run(name, "cat", "/srv/project/hello.txt") == "hello from the host\n"
    person.run(name, "sh", "-c", "echo x > /srv/project/written")
    assert (project / "written").stat().st_uid == person.uid
    assert person.try_berth("run", "-n", name, "--root", "--", "touch", "/srv/fixed/no").status == 1
    assert person.run(name, "pwd", cwd=project).strip() in ("/srv/project", "/srv/fixed", str(person.home))


def test_a_link_in_the_guest_leads_nowhere_on_the_host(
    person: Person, machine: Callable[..., str], project: Path
) -> None:
    """The machine's root replaces a mount point's parent by a link to the host's /tmp; the next start stays inside."""
    name = machine("--home-mount", "none")
    person.berth("run", "-n", name, "--root", "--", "sh", "-c", "rm -rf /srv; ln -s ../../../../../tmp /srv")
    person.berth("set", "-n", name, f"mount+={project}:/srv/berth-test-inside")
    person.berth("restart", name)
    assert person.run(name, "cat", "/tmp/berth-test-inside/hello.txt") == "hello from the host\n"
    assert not Path("/tmp/berth-test-inside").exists()


def test_the_ssh_agent_is_forwarded(person: Person, debian: str, session: Path) -> None:
    path = session / f"ssh-agent-{person.label}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.chown(path, person.uid, -1)
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"answer to " + sock.recv(100))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        script = (
            "import os, socket; s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']); "
            "s.sendall(b'question'); print(s.recv(100).decode())"
        )
        perl = (
            "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ENV{SSH_AUTH_SOCK}) or die $!; "
            "syswrite $s, 'question'; sysread $s, my $b, 100; print $b"
        )
        del script
        said = person.run(debian, "perl", "-e", perl, env={"SSH_AUTH_SOCK": str(path)})
        thread.join(10)
    path.unlink()
    assert said == "answer to question"
