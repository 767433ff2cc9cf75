"""What to do: suites of tasks in simulators, one file each."""
