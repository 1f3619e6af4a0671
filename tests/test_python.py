"""scripts/python.sh and `make setup`: which Python makes the environment."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, make

HERE = os.path.realpath(sys.executable)
VERSION = "{}.{}".format(*sys.version_info)


def interpreter(path, version):
    """A stand-in that answers the script's question as a Python of this version would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase " $* " in *" {version} "*) echo "$0";; *) exit 1;; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def ask(tmp_path):
    """scripts/python.sh on a machine that has only what the test puts into bin/ and home/."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "ls", "cat", "sh"):
        path = subprocess.run(["which", name], capture_output=True, text=True, check=True)
        (tmp_path / "bin" / name).symlink_to(path.stdout.strip())

    def run(*args):
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")}
        command = [f"{ROOT}/scripts/python.sh", *args]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_the_first_version_that_is_there_is_taken(ask, tmp_path):
    newest = interpreter(tmp_path / "bin/python3.13", "3.13")
    assert ask().stdout.strip() == newest
    middle = interpreter(tmp_path / "bin/python3.12", "3.12")
    assert ask().stdout.strip() == middle
    assert ask("3.13").stdout.strip() == ask("python3.13").stdout.strip() == newest
    assert ask("").stdout.strip() == middle  # PYTHON is empty in the Makefile


def test_pyenv_uv_and_python3_are_looked_at(ask, tmp_path):
    plain = interpreter(tmp_path / "bin/python3", "3.13")
    assert ask().stdout.strip() == plain
    of_uv = interpreter(tmp_path / "uv python/3.13/python", "3.13")
    uv = tmp_path / "bin/uv"
    uv.write_text(
        f'#!/bin/sh\n[ "$*" = "python find --no-python-downloads 3.13" ] && echo "{of_uv}"\n'
    )
    uv.chmod(0o755)
    assert ask().stdout.strip() == of_uv
    of_pyenv = interpreter(tmp_path / "home/.pyenv/versions/3.12.1/bin/python", "3.12")
    assert ask().stdout.strip() == of_pyenv


def test_one_that_does_not_run_is_passed_over(ask, tmp_path):
    """As pyenv's python3.12 does where no 3.12 is chosen; or a Debian without python3-venv."""
    shim = tmp_path / "bin/python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    found = interpreter(tmp_path / "bin/python3.13", "3.13")
    done = ask()
    assert (done.stdout.strip(), done.stderr) == (found, "")


def test_the_error_says_what_to_install(ask, tmp_path):
    interpreter(tmp_path / "bin/python3", "3.9")
    done = ask()
    assert done.returncode == 1 and not done.stdout
    assert "error: no Python 3.11, 3.12 or 3.13 that can make environments" in done.stderr
    assert "apt-get install" in done.stderr and "uv python install" in done.stderr
    done = ask(str(tmp_path / "bin/python3"))
    assert done.returncode == 1 and "python3 is no Python 3.11, 3.12 or 3.13" in done.stderr


def test_a_real_one_answers(ask):
    for name in (HERE, VERSION):
        done = subprocess.run(
            [f"{ROOT}/scripts/python.sh", name], capture_output=True, text=True, check=True
        )
        out = subprocess.run(
            [done.stdout.strip(), "--version"], capture_output=True, text=True, check=True
        )
        assert out.stdout.startswith(f"Python {VERSION}.")


def copy_setup(folder):
    """What `make setup` reads, newer than any environment."""
    for name in ("Makefile", "requirements.txt", "requirements-common.txt"):
        shutil.copyfile(f"{ROOT}/{name}", folder / name)
    (folder / "scripts").symlink_to(f"{ROOT}/scripts")


def test_an_environment_of_another_version_is_not_taken_for_it(tmp_path):
    """make setup PYTHON=... where .venv is there already."""
    copy_setup(tmp_path)
    for name in ("requirements.txt", "requirements-common.txt"):
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\necho Python 3.99.1\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    assert make(tmp_path, "setup").returncode == 0
    done = make(tmp_path, "setup", f"PYTHON={HERE}")
    assert done.returncode == 2
    assert "error: .venv is there already, with Python 3.99.1; remove it" in done.stdout


def test_an_environment_keeps_its_python_when_it_is_brought_up_to_date(tmp_path):
    """make setup where requirements are newer than .venv, which another Python had made."""
    copy_setup(tmp_path)
    other = "3.13" if VERSION != "3.13" else "3.12"
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
        case " $* " in
        *" --version "*) echo Python {other}.0 ;;
        *" - "*) case " $* " in *" {other} "*) echo "$0" ;; *) exit 1 ;; esac ;;
        *) echo "$*" >> {tmp_path}/log ;;
        esac
        """
    )
    python.chmod(0o755)
    done = make(tmp_path, "setup", f"PYTHON={HERE}")
    assert done.returncode == 2 and f"already, with Python {other}.0; remove it" in done.stdout
    assert not (tmp_path / "log").exists()
    done = make(tmp_path, "setup")
    assert done.returncode == 0 and "is made with" not in done.stdout, done.stderr
    assert (tmp_path / "log").read_text().splitlines() == ["-m pip install -r requirements.txt"]
    assert (tmp_path / ".venv/installed").exists()


def test_what_is_no_python_or_no_single_folder_is_refused(ask, tmp_path):
    copy_setup(tmp_path)
    done = ask(shutil.which("true"))
    assert done.returncode == 1 and "is no Python 3.11, 3.12 or 3.13" in done.stderr
    for folder in ("sp ace", ""):
        done = make(tmp_path, "setup", f"VENV={folder}")
        assert done.returncode == 2 and "must be one folder" in done.stderr
