"""The live page of runs, `ddm ui`: it reads run folders and writes nothing."""
