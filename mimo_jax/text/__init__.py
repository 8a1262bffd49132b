"""Text: tokens, conversations in and answers out."""
