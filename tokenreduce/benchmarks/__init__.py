"""Images, questions and scoring."""
