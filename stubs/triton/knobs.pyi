class runtime_knobs:
    @property
    def interpret(self) -> bool: ...

runtime: runtime_knobs
