"""Ctrl-C during training and chat: exit status 130, one line, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kt_sft.integrations import interrupt


def test_interrupt_becomes_a_line_and_a_status(capsys):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        interrupt.ending_cleanly(work, "Work", "Try again.")()
    assert error.value.code == 130
    assert capsys.readouterr().err == "\nWork interrupted. Try again.\n"


def test_other_errors_and_results_pass_through():
    assert interrupt.ending_cleanly(lambda: 3, "Work")() == 3
    with pytest.raises(ZeroDivisionError):
        interrupt.ending_cleanly(lambda: 1 / 0, "Work")()


def test_stop_generation_waits_for_the_generating_thread(monkeypatch):
    monkeypatch.setattr(interrupt, "_stop", threading.Event())
    monkeypatch.setattr(interrupt, "_threads", weakref.WeakSet())
    started, finished = threading.Event(), []

    def generate(stopping_criteria):
        while not stopping_criteria(torch.zeros(1, 3, dtype=torch.long), None).all():
            started.set()
            time.sleep(0.01)
        finished.append(True)

    thread = threading.Thread(target=interrupt._stoppable(generate), daemon=True)
    thread.start()
    started.wait(10)
    assert interrupt.stop_generation()
    assert finished


def test_end_of_input_ends_the_chat(capsys):
    module = SimpleNamespace(ChatModel=type("ChatModel", (), {}), run_chat=lambda: (_ for _ in ()).throw(EOFError))
    interrupt.patch_chat_model(module)
    module.run_chat()
    assert capsys.readouterr().out == "\n"


def interrupted(workspace, verb: str, args: dict, when: str, stdin: str = "") -> tuple[int, str]:
    """Start ``llamafactory-cli verb``, send SIGINT once ``when`` has been printed; (exit status, output)."""
    command = [sys.executable, str(Path(sys.executable).parent / "llamafactory-cli"), verb]
    process = subprocess.Popen(
        [*command, workspace.write(f"{verb}_interrupted.yaml", args)],
        env=workspace.env(PYTHONUNBUFFERED="1"),
        cwd=workspace.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell that starts this in its background ignores the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(stdin.encode())
    process.stdin.flush()
    text = b""
    while when.encode() not in text:
        piece = process.stdout.read1(4096)  # type: ignore[attr-defined]
        assert piece, text.decode()[-3000:]
        text += piece
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, (text + rest).decode()


def test_training(workspace):
    args = workspace.training("interrupted", max_steps=100000, save_steps=100000)
    status, text = interrupted(workspace, "train", args, "'loss'")
    assert status == 130, text[-3000:]
    assert "Training interrupted" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("when", "stdin"), [("Assistant: ", "Who are you?\n"), ("User: ", "")])
def test_chat(workspace, when, stdin):
    args = {**workspace.base(), "max_new_tokens": 100000, "do_sample": True}
    status, text = interrupted(workspace, "chat", args, when, stdin)
    assert status == 130, text[-3000:]
    assert "Chat interrupted" in text
    assert "Traceback" not in text and "terminate called" not in text
