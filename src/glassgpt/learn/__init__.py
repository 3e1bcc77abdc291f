"""The book: 16 lessons in `lessons/`, their exercises, and the checkers of the exercises."""
