"""The commands of the command line, one module each: ``add(commands)`` its options, ``run(options)`` the work."""
