"""What every kernel uses: launching and its settings, the interpreter, a fence, tanh; how its commands end."""
