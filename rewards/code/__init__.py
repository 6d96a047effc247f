"""Programs judged by tests: formats to tests, completion to program, program and tests to outcomes, outcomes to score."""
