"""The book: the lessons in `lessons/`, their exercises, and the checkers of the exercises."""
