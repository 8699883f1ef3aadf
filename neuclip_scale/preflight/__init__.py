"""Are all nodes of a job fit to train? Every rank probes its own part, one process hears them and names the bad node.

The ranks (`neuclip preflight probe`, under srun) print what they find, a line at a time and before they try the next
thing, so that one that hangs has told where. The judge (`neuclip preflight judge`) reads their lines, and has the last
word when the time is over.
"""
