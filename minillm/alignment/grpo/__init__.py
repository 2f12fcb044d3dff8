"""Learning from groups of answers: its options, and the advantages of answers over their group."""
