"""This wing trains models, exits and gates; an interrupted training goes on where it was."""
