"""DataComp's evaluation: 38 tasks, their own metrics, its averages and its result file (arXiv 2304.14108)."""
