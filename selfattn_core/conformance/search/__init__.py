"""The search: a seeded search for runs that no case of the table has, and tokens that repeat what it finds."""
