"""The book: the sixteen lessons in `lessons/`, their exercises, and the checkers of the exercises."""
