"""A small multilingual collection with exactly known relevance, for demonstrations and tests."""
