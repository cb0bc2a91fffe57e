"""The figures of all chains: kills by arm and phase, resumes, what was different, what was left."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from chaos.arms import Arm
from chaos.chain import Chain
from chaos.run import PHASES

_TITLES = {"start": "before step 1", "cache": "caching", "train": "training", "save": "save", "validate": "validation"}


class Summary:
    """Chains as they come to their ends."""

    def __init__(self, arms: list[Arm], seed: int) -> None:
        self.arms, self.seed = arms, seed
        self.chains: list[Chain] = []

    @property
    def kills(self) -> int:
        return sum(len(chain.kills) for chain in self.chains)

    @property
    def failed(self) -> bool:
        return any(chain.problems or chain.unusable for chain in self.chains)

    def add(self, chain: Chain) -> str:
        """Count a chain; returns its line."""
        self.chains.append(chain)
        verdict = "; ".join(["DIFFERENT", *chain.problems]) if chain.problems else "identical"
        broken = f", {len(chain.unusable)} unusable checkpoints" if chain.unusable else ""
        killed = ", ".join(_TITLES.get(phase, phase) for phase in chain.kills) or "never"
        return f"{chain.arm}: killed in {killed}; {chain.resumes} resumes{broken} ({chain.seconds:.0f} s): {verdict}"

    def text(self) -> str:
        """The figures as tables."""
        head = ["arm", "kills", *(_TITLES.get(phase, phase) for phase in PHASES), "resumes", "identical"]
        rows = [self._row(arm.name) for arm in self.arms] + [self._row(None)]
        widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join(str(cell).rjust(width) if i else str(cell).ljust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in [head, *rows])
        ]
        alone = Counter(end for chain in self.chains for end in chain.survivors)
        broken = [name for chain in self.chains for name in chain.unusable]
        left = [size for chain in self.chains for size in chain.left.values()]
        different = [chain for chain in self.chains if chain.problems]
        lines += [
            "",
            f"one rank killed first: {alone.total()}; the other ended {alone['ended']}, had to be killed "
            f"{alone['killed too']}",
            f"unusable checkpoints under a checkpoint's name: {len(broken)}",
            *(f"  {Path(line).name}" for line in broken),
            f"temporary files left at the end: {len(left)}, {sum(left) / 2**20:.1f} MiB",
            f"runs that are not identical: {len(different)} of {len(self.chains)}",
            *(f"  {chain.arm}: {problem}" for chain in different for problem in chain.problems),
            f"seed {self.seed}, {sum(chain.seconds for chain in self.chains):.0f} s",
        ]
        return "\n".join(lines)

    def _row(self, name: str | None) -> list[str | int]:
        chains = [chain for chain in self.chains if name is None or chain.arm == name]
        phases = Counter(phase for chain in chains for phase in chain.kills)
        same = sum(not chain.problems for chain in chains)
        counts = [phases[phase] for phase in PHASES]
        resumes = sum(chain.resumes for chain in chains)
        return [name or "all", phases.total(), *counts, resumes, f"{same}/{len(chains)}"]

    def json(self) -> str:
        return json.dumps({"seed": self.seed, "kills": self.kills, "chains": list(map(asdict, self.chains))}, indent=1)
