"""From events to batches: sources, vocabulary, sequences, packed rows."""
