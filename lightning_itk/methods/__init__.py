"""InstructionModule and its methods: SFT, KD, DAE."""
