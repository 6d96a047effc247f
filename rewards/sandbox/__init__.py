"""Where untrusted programs run.

    Sandbox (outside)                     runner (inside bubblewrap, a real unprivileged user)
      program, input --- descriptors --->   forks a child for every run: rlimits, system-call filter, program
      output, results <-- descriptors --                           |
      status <---------- control -------- waits for it <-----------+

What a program prints or returns arrives as bytes of its own files and is data; the expected outputs are never sent.
"""
