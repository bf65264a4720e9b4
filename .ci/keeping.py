"""llmswap with a model that keeps its context, and a person who talks to it."""

import os
import re
import signal

from test_llmswap import Llmswap, context_file, eventually, family


class Keeping(Llmswap):
    """llmswap on a context_file."""

    def __init__(self, folder, *lines):
        self.place = folder
        self.text = context_file(folder, *lines)
        super().__init__(self.text)

    def fault(self, text):
        """From now on the fake servers' slots have this fault."""
        (self.place / "fault").write_text(text)

    def tell(self, talk="x", prompt=3000, model="a", **wish):
        """Go on with a conversation; return how much of its prompt was in the cache."""
        answer = self.chat(model, talk=talk, prompt_tokens=prompt, **wish)
        eventually(lambda: self.get("/health").json()["requests"] == 0)  # it is recorded
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def swap(self):
        """Have a unloaded for b."""
        assert self.chat("b").status == 200

    def tell_and_swap(self, *words, **wish):
        cached = self.tell(*words, **wish)
        self.swap()
        return cached

    def restart(self):
        self.process.terminate()
        assert self.process.wait(30) == 0
        self.start()

    def await_unloaded(self):
        eventually(lambda: self.states()["a"] == "unloaded")

    def reload_and_swap(self):
        self.reload(self.text.replace("[b]\nc = 1", "[c]\nc = 2"))
        eventually(lambda: "c" in self.states())
        assert self.states()["a"] == "loaded" and self.chat("c").status == 200

    def change_command(self):
        self.reload(self.text.replace("keep-context", "d = 1\nkeep-context"))
        eventually(lambda: "was read again" in self.log())

    def change_file(self, name):
        with open(self.place / name, "a") as file:
            file.write("# new")

    def crash(self):
        """Have the context restored, and kill the server that has it."""
        assert self.tell() == 3000
        [pid] = [pid for pid, line in family(self.token).items() if "--alias a" in line]
        os.kill(pid, signal.SIGKILL)
        self.await_unloaded()

    def actions(self, action):
        """How often its servers were asked for this action on a slot."""
        return (self.place / "journal").read_text().count(f'"event": "{action}"')

    def complaints(self, least=0):
        """The lines of the log that say why a context is not there; wait until there
        are so many, as the log is written by a thread of its own."""
        why = re.compile(r"a \| llmswap: (.*context.*)")
        eventually(lambda: len(why.findall(self.log())) >= least)
        return why.findall(self.log())

    def files(self, model="a"):
        """The files of saved contexts, without the manifest."""
        return [*self.place.glob(f"state/context/{model}/{model}.*")]
