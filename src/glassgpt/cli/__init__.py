"""The commands of the command line, by subject. Each reads its options, and only then imports what it runs."""
