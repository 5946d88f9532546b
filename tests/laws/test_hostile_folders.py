"""The judge of the hostile folders' benchmark sees what a command must not do."""

import pytest

from benchmarks.testbed.hostile_folders import judge_call


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ('openat(AT_FDCWD</w>, "/run/x", O_WRONLY|O_CREAT, 0666) = 3</run/x>', ""),
        ('openat(AT_FDCWD</w>, "/run/x", O_WRONLY|O_CREAT, 0666) = 3</home/x>', "outside"),
        ('openat(AT_FDCWD</w>, "/home/x", O_RDONLY) = 3</home/x>', ""),
        ('openat(AT_FDCWD</w>, "/home/x", O_WRONLY) = -1 EACCES (Permission denied)', ""),
        ('unlink("/home/x") = 0', "outside"),
        ('unlinkat(5</home>, "x", 0) = 0', "outside"),
        ('rename("/run/a", "/run/b") = 0', ""),
        ('rename("/run/a", "/home/b") = 0', "outside"),
        ("connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons(9)}, 16) = -1 ECONNREFUSED (x)", "connection"),
        ("kill(77, SIGKILL) = 0", "process"),
        ("kill(77, 0) = 0", ""),
        ("tgkill(5, 5, SIGABRT) = 0", ""),
        ('execve("/bin/sh", ["sh"], 0x7 /* 9 vars */) = 0', "program"),
    ],
)
def test_judge_sees_forbidden_system_calls(call, fault):
    assert judge_call(call, "5", ("/run",)) == fault
