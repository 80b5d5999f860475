"""The program and the real huggingface_hub, in separate processes, against a Hub on loopback."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback_hub.server import Hub
from tests.process import PROGRAM
from tests.program import Ended

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_alice"


@dataclass
class Visitor:
    """A user with a working directory, a cache, a login and the address of one Hub."""

    hub: Hub
    home: Path
    token: str | None = TOKEN
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that the user's processes have of their own."""
        return {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            # huggingface_hub uploads through Xet if it can, which the loopback Hub does not offer.
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **({"HF_TOKEN": self.token} if self.token else {}),
            **self.environment,
        }

    def start(self, *words: object, program: list[str] = PROGRAM) -> "subprocess.Popen[str]":
        """Start `program` with `words`."""
        own = ("HF_", "HUGGING_FACE_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        self.home.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*program, *map(str, words)],
            cwd=self.home,
            env={**inherited, **self.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def types(self, *words: object) -> Ended:
        """Run one command of svdconvert."""
        process = self.start(*words)
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out, err)

    def succeeds(self, *words: object) -> Ended:
        """Run one command that must do what it says."""
        ended = self.types(*words)
        assert ended.status == 0, ended
        return ended

    def succeeds_with(self, *commands: list[object]) -> None:
        """Run several commands that must do what they say, one after the other in one process."""
        words = [[str(word) for word in command] for command in commands]
        self.runs(
            f"from tests.program import succeeded\nresult = [succeeded(*words).out for words in {words!r}]"
        )

    def is_refused(self, *words: object, because: list[object]) -> str:
        """Run one command that must end in one sentence that holds all of `because`; return it."""
        ended = self.types(*words)
        assert ended.status == 1, ended
        lines = ended.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("svdconvert: "), ended
        assert [word for word in because if str(word) not in lines[0]] == [], lines[0]
        return lines[0]

    def runs(self, program: str) -> object:
        """Run Python text that leaves its result in `result`; return that."""
        text = f"import json, sys\n{program}\nsys.stdout.write('\\n' + json.dumps(result))"
        process = self.start(program=[sys.executable, "-c", text])
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def cached(self) -> list[str]:
        """Names of the files of all snapshots in the cache."""
        return sorted(path.name for path in (self.home / "hf").glob("hub/models--*/snapshots/*/**/*.*"))
