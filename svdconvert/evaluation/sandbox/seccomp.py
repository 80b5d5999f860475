"""The system calls that a generated program may make, as a filter for the kernel (seccomp, classic BPF).

Refused are: sockets, new processes and programs, other processes, system settings, and everything that
changes files by name without opening them, which Landlock does not see (chmod, chown, times, attributes). It
holds for root too. See seccomp(2), and linux/seccomp.h for the structure that a filter reads.
"""

import errno
from collections.abc import Sequence

Instruction = tuple[int, int, int, int | str]
"""(operation, jump if true, jump if false, operand). The operand "pid" is the process's own number."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""platform.machine() -> the number that the kernel gives the architecture."""

# Name: (x86_64, aarch64); None if the architecture does not have it.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # connections
    "socket": (41, 198),
    "socketpair": (53, 199),
    # processes and programs
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "personality": (135, 92),
    # other processes
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that outlives the process
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # files by name
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # the system
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
}
CLONE = (56, 220)
TGKILL = (234, 131)
PRLIMIT = (302, 261)
FCNTL = (72, 25)
OWNER_COMMANDS = (8, 10, 15)
"""F_SETOWN, F_SETSIG and F_SETOWN_EX, by which the kernel sends another process signals."""
# From here on all architectures have the same numbers. An older kernel refuses a call that it does not know
# with the same error, so that the C library does without it: io_uring, clone3, pidfd_*, fchmodat2 ...
FIRST_NEW = 424
ALLOWED_NEW = {"close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449}

_CLONE_THREAD = 0x10000
_ALLOW = 0x7FFF0000
_ERROR = 0x00050000
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
# Where struct seccomp_data has the number, the architecture, and the lower half of the first argument.
_NUMBER = 0
_ARCHITECTURE = 4
_FIRST_ARGUMENT = 16
_SECOND_ARGUMENT = 24


def call_filter(machine: str) -> list[Instruction]:
    """The filter for a machine, one of ARCHITECTURES."""
    column = list(ARCHITECTURES).index(machine)
    refuse: Instruction = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in ALLOWED_NEW.values():
        program += _if_equal(number, [allow])
    # Numbers of the x32 interface of x86-64 are above this one too.
    program += [(_AT_LEAST, 0, 1, FIRST_NEW), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for numbers in REFUSED.values():
        number_here = numbers[column]
        if number_here is not None:
            program += _if_equal(number_here, [refuse])
    command: Instruction = (_LOAD, 0, 0, _SECOND_ARGUMENT)
    owners = [part for number in OWNER_COMMANDS for part in _if_equal(number, [refuse])]
    program += _if_equal(FCNTL[column], [command, *owners, allow])
    argument: Instruction = (_LOAD, 0, 0, _FIRST_ARGUMENT)
    program += _if_equal(CLONE[column], [argument, (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, allow])
    program += _if_equal(TGKILL[column], [argument, (_EQUAL, 1, 0, "pid"), refuse, allow])
    program += _if_equal(PRLIMIT[column], [argument, (_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, "pid"), refuse, allow])
    return [*program, allow]


def _if_equal(number: int, then: Sequence[Instruction]) -> list[Instruction]:
    return [(_EQUAL, 0, len(then), number), *then]
