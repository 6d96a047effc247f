"""Programs judged by tests: columns to tests (`formats`), completion to program (`completion`), program and tests to
outcomes (`trial`, `comparison`), outcomes to a verdict (`reward`)."""
