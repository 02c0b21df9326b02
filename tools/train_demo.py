"""Make the demo model that ships with Reprise: its text, its tokenizer, its training, its scores.

The model is a Qwen3 decoder of under four million parameters that can do three things: tell short
stories, add two numbers and copy what it is given, each in plain text and as a chat. All of its
text comes from the grammar in this file, so nothing is downloaded and one seed gives one data set.

    python tools/train_demo.py --out src/reprise/demo_model --minutes 3.7 --compile

trains on whatever accelerator torch finds (or the CPU, which takes hours), writes an ordinary
Hugging Face checkpoint, reads it back in float32 and scores it on material it has never seen.
The exit status is 1 when a score is below its gate. `docs/demo-model.md` holds the results.

Importing this module is cheap: torch and transformers are loaded only when training starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SEED = 20240607
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 2048
VOCAB_SIZE = 2048

# A document is a list of (text, learned) segments; only learned segments count in the loss.
Doc = list[tuple[str, bool]]


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """The parts of a text between its " // " marks."""
    return tuple(text.split(" // "))


# --- Arithmetic -----------------------------------------------------------------------------------


def is_held_out(a: int, b: int) -> bool:
    """Whether `a + b` is kept out of training; a pair and its mirror image always go together.

    Only two-digit operands are ever held out. The rule is a hash, so that held-out pairs follow no
    arithmetic pattern: sha256 of `"low+high"`, read as a big-endian integer, is divisible by 14.
    """
    if not (10 <= a <= 99 and 10 <= b <= 99):
        return False
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest, "big") % 14 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    """Every (a, b) that training never shows, in order."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]


def draw_operands(rng: random.Random) -> tuple[int, int]:
    """Operands from 0 to 99 for training: mostly two-digit, never a held-out pair."""
    while True:
        low_a, low_b = (10, 10) if rng.random() < 0.88 else rng.choice(((0, 0), (0, 10), (10, 0)))
        a, b = rng.randint(low_a, 99), rng.randint(low_b, 99)
        if not is_held_out(a, b):
            return a, b


def addition(rng: random.Random) -> Doc:
    """Plain addition: `47 + 38 =` continues with ` 85`. One in ten is written without spaces."""
    a, b = draw_operands(rng)
    if rng.random() < 0.1:
        return [(f"{a}+{b}=", False), (f"{a + b}{END}", True)]
    return [(f"{a} + {b} =", False), (f" {a + b}{END}", True)]


ASK_SUM = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "what is {a} + {b}",
    "What is {a} plus {b}?",
    "{a} + {b}",
    "{a} + {b} =",
    "{a} + {b} = ?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "What do you get if you add {a} and {b}?",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}",
    "What is the sum of {a} and {b}?",
)


def sum_turn(rng: random.Random) -> tuple[str, str]:
    """A question about a sum, and its answer."""
    a, b = draw_operands(rng)
    return rng.choice(ASK_SUM).format(a=a, b=b), f"{a} + {b} = {a + b}"


# --- Copying --------------------------------------------------------------------------------------

UNICODE_ITEMS = words(
    "café naïve señor über façade jalapeño crème brûlée Zoë Łódź Århus "
    "привет мир книга καλημέρα φως שלום سلام नमस्ते สวัสดี 日本 こんにちは 你好 世界 한국 "
    "☕ 🚀 🦊 🌙 🎉 ❤ ★ → € £ ° ½"
)


def copy_items(rng: random.Random) -> str:
    """Two to twelve words, numbers, letters or bits of other scripts, separated by spaces."""
    first = True
    items: list[str] = []
    for _ in range(rng.randint(2, 12)):
        kind = rng.random()
        if kind < 0.58:
            word = rng.choice(WORDS)
            items.append(word.capitalize() if rng.random() < 0.15 else word)
        elif kind < 0.75:
            items.append("".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6))))
        elif kind < 0.88:
            items.append(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        elif kind < 0.94 or first:
            items.append(rng.choice(UNICODE_ITEMS))
        else:
            letters = "abcdefghijklmnopqrstuvwxyz"
            items.append("".join(rng.choice(letters) for _ in range(rng.randint(2, 6))))
        first = False
    return " ".join(items)


def copying(rng: random.Random) -> Doc:
    """Plain copying: `Copy: river 42 k` and a line break continue with `river 42 k`."""
    text = copy_items(rng)
    return [(f"Copy: {text}\n", False), (f"{text}{END}", True)]


ASK_COPY = (
    "Repeat after me: {text}",
    "Repeat after me: {text}",
    "Repeat: {text}",
    "Say: {text}",
    "Copy: {text}",
    "Please repeat: {text}",
    "Please repeat after me: {text}",
    "Can you say this? {text}",
)


def copy_turn(rng: random.Random) -> tuple[str, str]:
    """A request to repeat something, and the repetition."""
    text = copy_items(rng) if rng.random() < 0.6 else rng.choice(sentences(rng))
    return rng.choice(ASK_COPY).format(text=text), text


# --- Stories --------------------------------------------------------------------------------------
#
# A story is an opening, one or two plots and an ending. In the text below, a line that starts with
# "- " is a beat (exactly one sentence group in the story); its alternatives are separated by " // "
# and it may run over several lines. Inside a beat, [a|b] picks one branch and {name} is filled in
# from the story's cast, so a name, a pronoun or an object stays the same from start to end.
# "with" lines belong to a plot and give one set of values, of which each telling uses one.
#   {H} the hero, {F} a friend, {G} someone met on the way; {he} {him} {his} {He} {His} follow the
#   hero, {fhe} ... the friend and {ghe} ... the third; {kind} {fkind} {gkind} say what they are.

FEMALE = words(
    "Mia Lily Anna Rosa Nora Ella Luna Ruby Ivy Clara Daisy Hazel Maya Zoe Lucy Emma Sara Willow "
    "Olive Pearl June Freya Tilly Wren Juno Greta Alma Fern Iris Stella Penny Molly Holly Ada "
    "Bella Cora Dora Edith Flora Gwen"
)
MALE = words(
    "Tom Ben Max Leo Sam Jack Finn Hugo Otto Felix Oscar Theo Milo Eli Noah Jasper Rufus Toby "
    "Arlo Basil Bruno Casper Dexter Edgar Fergus Gus Henry Ivan Jonah Kip Louis Marlow Ned Oliver "
    "Pip Quinn Rory Simon Walter Ziggy"
)
ANIMALS = words(
    "fox rabbit bear owl mouse hedgehog squirrel turtle frog otter cat dog puppy kitten pony duck "
    "goose crow sparrow penguin badger beaver deer wolf lion tiger elephant monkey panda koala "
    "goat sheep lamb pig donkey snail bee mole raccoon kangaroo parrot swan camel zebra giraffe "
    "lizard hamster"
)
PEOPLE = words(
    "baker farmer sailor gardener painter fisher knight wizard shepherd tailor pirate inventor "
    "librarian teacher miner musician potter carpenter traveler cook"
)
FANTASY = words("dragon robot ghost giant elf fairy unicorn troll gnome dwarf snowman")
GENDERED = {"girl": "she", "boy": "he", "princess": "she", "prince": "he", "queen": "she",
            "king": "he", "witch": "she", "hen": "she", "rooster": "he"}  # fmt: skip
KINDS = (*ANIMALS, *PEOPLE, *FANTASY, *GENDERED)
TRAITS = words(
    "brave shy curious kind clever cheerful gentle patient funny sleepy stubborn quick quiet "
    "friendly little young tiny lonely honest playful careful proud hopeful busy"
)
COMPARABLE = words("cheerful patient stubborn curious careful honest hopeful")
COLORS = words("red blue green yellow purple orange white silver golden pink brown striped")
THINGS = words(
    "kite scarf hat key whistle ball button bell book lantern ribbon basket flute compass mitten "
    "umbrella cup coin marble ring spoon feather drum teapot blanket boat puppet necklace pencil "
    "mirror bottle box watch toy cart"
)
FOODS = phrases(
    "apple pie // honey cake // loaf of bread // bowl of soup // basket of berries // bag of nuts"
    " // plate of cookies // jar of jam // piece of cheese // cherry tart // bunch of grapes"
    " // pot of stew // carrot cake // slice of melon"
)
RELATIVES = words("grandmother grandfather mother father aunt uncle sister brother")

# place | how one is there | spots in it | what lies about there
PLACES = """
the forest | in the forest | old oak tree, hollow log, mossy stone, fallen pine, fern patch | leaves
the meadow | in the meadow | tall grass, clover patch, wooden fence, round hill, rose bush | flowers
the village | in the village | stone well, clock tower, bakery, old bridge, market gate | straw
the beach | on the beach | sand dune, big rock, broken boat, tide pool, striped tent | shells
the mountain | on the mountain | dark cave, narrow path, frozen stream, tall cliff, lone pine | snow
the garden | in the garden | apple tree, stone wall, pumpkin patch, little pond, tool shed | weeds
the farm | on the farm | red barn, hay stack, chicken coop, water pump, old wagon | hay
the castle | in the castle | tall tower, iron gate, long hall, spiral stairs, great oven | dust
the island | on the island | palm tree, sandy bay, rope bridge, smoking hill, fishing hut | sand
the harbor | in the harbor | lighthouse, fish market, long pier, anchored ship, rope pile | ropes
the desert | in the desert | tall cactus, red rock, dry well, sandy ridge, green oasis | sand
the swamp | in the swamp | crooked willow, muddy bank, reed bed, floating log, misty pond | mud
the valley | in the valley | frozen lake, wooden cabin, pine grove, stone bridge, steep path | ice
the orchard | in the orchard | pear tree, ladder, stone bench, fruit cart, beehive | apples
the town | in the town | fountain, train station, little bakery, park bench, street lamp | paper
the jungle | in the jungle | giant vine, waterfall, hidden temple, banana tree, river bend | vines
the old mill | at the old mill | water wheel, flour sacks, back door, mill pond, stone steps | flour
the hills | in the hills | lonely tree, sheep pen, rocky stream, ruined tower, grassy slope | stones
"""

OPENING = """
- Once upon a time, there was {a_hero} named {H} who lived {in_place}. {home} // Once upon a time,
  there was {a_hero} named {H}. {He} lived {in_place}[, near the {spot0}|, beside the {spot0}|]. //
  Once upon a time, {a_hero} named {H} lived {in_place}. {home} // Once upon a time, {in_place},
  there lived {a_hero} named {H}. {home} // Once upon a time there lived {a_hero}. {His} name was
  {H}, and {his} home was {in_place}. // There once was {a_hero} named {H} who lived {in_place}.
  {home} // Long ago, {a_hero} named {H} lived {in_place}. {home} // {H} was {a_hero} who lived
  {in_place}. {home} // [Far away|Not far from here], {in_place}, there lived {a_hero} named {H}.
  {home}
- {friend_intro}
"""

HOME = """
- {His} home stood [near|beside] the {spot0}. // {He} had a [cozy|small|warm|crooked] house
  [near|behind|beside] the {spot0}. // Every [morning|evening], {he} [sang|sat|walked|took a nap]
  [near|beside] the {spot0}. // Everyone said that there was no {kind} more {trait2} than {H}. //
"""

FRIEND_INTRO = """
- {His} best friend was {a_friend} named {F}. // {H} had a good friend, {a_friend} named {F}. //
  {F}, {a_friend}, lived [next door|close by|just around the corner], and the two did everything
  together. // {He} spent most days with {F}, {a_friend} who [loved to talk|knew many songs|always
  had a plan|told the best jokes].
"""

FIRST_DAY = """
- One [sunny|windy|cold|warm|cloudy|bright|foggy|quiet|rainy|fine] [morning|afternoon|day|evening]
  // One [spring|summer|autumn|winter] [morning|day|evening] // One day // Early one morning
"""

NEXT_DAY = """
- The next [day|morning] // A few days later // One week later // Not long after that // Some time
  later // When [spring|summer|autumn|winter] came
"""

PLOTS = """
# something lost
- {Day}, {H} could not find {his} {color} {thing}. // {Day}, {H} came home from {place} and saw that
  {his} {color} {thing} was missing. // {Day}, {H} reached for {his} {color} {thing}, but it was
  [gone|not there].
- {He} loved that {thing} [very much|more than anything], because it was a gift from {his}
  {relative}. // It was {his} favorite {thing}, and {he} felt [like crying|very sad|quite sick]. //
  {His} {relative} had made it by hand, so {he} was very [sad|worried].
- +
- {He} looked [near|behind|beside] the {spot1}, but [there was nothing there|the {thing} was not
  there]. Then {he} searched [behind|around|near] the {spot2} and found only {clutter}. // {He}
  searched [behind|around|near] the {spot1} and then the {spot2}, but {he} found only {clutter}.
- {F} [saw {him} searching|heard {him} sigh|came by] and asked, "What is wrong?" // Just then {F}
  came along. "Why do you look so [sad|worried]?" {fhe} asked. // {H} went to {F} for help. "You
  look [upset|tired]," said {F}. "What happened?"
- "I lost my {color} {thing}," said {H} [softly|with a sigh|and looked at the ground]. // "My
  {thing} is gone," said {H}, "and I have looked everywhere."
- "Do not worry," said {F}. "We will look for it together." // "Then let us find it," said {F}. "Two
  pairs of eyes are better than one."
- +
- On the way they met {a_third} named {G}. "I saw something {color} near the {spot3} [today|this
  morning]," said {G}. // They asked {a_third} named {G}, who thought for a moment. "Try the
  {spot3}," {ghe} said. "The wind carries many things there."
- They [ran|hurried|raced] to the {spot3}, and there was the {thing}, [a little dusty but not
  broken|shining in the light|safe and dry|half covered with {clutter}]. // When they came to the
  {spot3}, {H} [gave a shout|jumped for joy]. There lay the {thing}!
- "Thank you!" [cried|shouted] {H}, and {he} hugged {F}. // {H} held the {thing} tight and thanked
  {F} and {G} [again and again|with all {his} heart].
moral: {H} never forgot that a good friend makes every search shorter. // From then on, {H} kept the
  {thing} in a safe place, and {he} kept {his} friends even closer. // That night, {H} put the
  {thing} beside {his} bed and slept with a smile.

# a new friend
- {H} was often alone, and {he} wished for someone to play with. // {H} had moved to a new house,
  and {he} did not know anyone {in_place}. // {H} was too shy to talk to the others {in_place}.
- {Day}, {he} heard someone [singing|humming|laughing] near the {spot1}. // {Day}, {he} saw someone
  [sitting|reading|drawing] all alone beside the {spot1}.
- It was {a_third} named {G}. // There sat {a_third} whose name was {G}.
- +
- {H} wanted to say hello, but {his} heart was beating fast, so {he} hid behind the {spot2}. // {H}
  opened {his} mouth, but no words came out. {He} almost ran away.
- Then {he} [took a deep breath|remembered what {his} {relative} had told {him}: be brave for just
  one minute]. "Hello," {he} said. "[May I sit here|Can I join you|Would you like to play]?"
- {G} looked up and smiled. "[I was hoping someone would ask|Yes, please]!" {ghe} said. "I have been
  [lonely|bored] all day." // "Of course!" said {G}. "I have {a_thing}, but it is no fun to play
  alone."
- +
- They played near the {spot3} until the sun went down. They [built a tower of stones|told silly
  stories|raced each other|drew pictures in the {clutter}], and {H} laughed more than {he} had in a
  long time. // All afternoon they [explored {place}|played hide and seek|danced and sang], and {H}
  showed {G} the {spot3}.
- "Will you come back tomorrow?" asked {G}. "Yes," said {H}. "And the day after that, too." // When
  it got dark, {G} gave {him} {a_thing}. "This is for you," {ghe} said, "because you were brave
  enough to say hello."
moral: From that day on, {H} and {G} were the best of friends. // {H} was never lonely again, and it
  had all started with one small word. // And {H} learned that the bravest word of all can be hello.

# a storm
- {Day}, dark clouds rolled over {place}. // {Day}, the sky above {place} turned black. // {Day},
  the wind began to howl around the {spot1}.
- Thunder boomed, and rain [fell in sheets|beat on the roofs|drummed on the ground]. // Lightning
  flashed, and the rain came down harder and harder.
- {H} was [safe|warm] at home with a [hot cup of tea|small fire|thick blanket] when {he} heard a
  knock at the door. // {H} had just closed the windows when {he} heard a voice calling outside.
- +
- Outside stood {F}, [wet and shaking|cold and afraid]. "My house is [full of water|broken]!" {fhe}
  said. "The storm has [torn off the roof|knocked down the door]." // It was {F}, wet from head to
  toe. "A tree fell on my house," {fhe} cried, "and I have nowhere to go."
- "Come in, come in!" said {H}. {He} gave {F} a dry blanket and {a_food}. // {H} pulled {him_f}
  inside at once and shared {his} {food}.
- All night long they listened to the wind. When {F} was afraid, {H} [told {fhim} a story|sang a
  soft song|held {fhis} hand|made {fhim} laugh]. // The thunder was loud, but it did not seem so bad
  now that they were together.
- +
- In the morning the sun came out, and {place} was [shining|quiet|covered with {clutter}]. // At
  last the storm was over, and a rainbow stood above the {spot2}.
- Together they [fixed the roof|cleaned the rooms|hung up a new door] of the house. {A_third} named
  {G} came by with [a hammer and nails|some wood|a long ladder] and helped, too. // They worked hard
  for three days, and {a_third} named {G} helped them. Soon {F} had a house that was stronger than
  before.
- "I will never forget this," said {F}. "You would do the same for me," said {H}. // "How can I
  thank you?" asked {F}. "You already have," said {H}, "by being my friend."
moral: After that, {H} was never afraid of storms again. // And whenever the wind howled, the two
  friends remembered that night and smiled. // A storm can break a roof, but it cannot break a
  friendship.

# learning something new
with: skill=swim; doing=swimming; tool=the water; mistake=swallowed a lot of water
with: skill=play the flute; doing=playing the flute; tool=a small flute; mistake=made only squeaks
with: skill=bake bread; doing=baking; tool=the oven; mistake=burned every loaf
with: skill=ride a bicycle; doing=riding; tool=an old bicycle; mistake=fell into a bush
with: skill=paint; doing=painting; tool=a brush; mistake=spilled the paint
with: skill=skate; doing=skating; tool=a pair of skates; mistake=slipped and fell
with: skill=juggle; doing=juggling; tool=three apples; mistake=dropped all the apples
with: skill=whistle; doing=whistling; tool=nothing but air; mistake=blew until everything spun
with: skill=read; doing=reading; tool=a thick book; mistake=mixed up all the letters
with: skill=dance; doing=dancing; tool=a pair of red shoes; mistake=tripped over both feet
with: skill=climb; doing=climbing; tool=a strong rope; mistake=got stuck halfway up
with: skill=knit; doing=knitting; tool=two long needles; mistake=tied everything in knots
- More than anything, {H} wanted to {skill}. // {H} had one big dream: {he} wanted to learn to
  {skill}. // Everyone {in_place} could {skill}, but {H} could not.
- {Day}, {he} went to the {spot1} with {tool} and tried. But {he} {mistake}. // {Day}, {he} tried it
  for the first time near the {spot1}. It did not go well. {He} {mistake}.
- [Some birds|The others] laughed, and {H} [ran home|hid {his} face|wanted to give up]. // "I will
  never learn it," {he} said, and {he} kicked a stone.
- +
- {A_third} named {G} had seen it all. "[Do you know|Shall I tell you] how often I failed?" {ghe}
  asked. "A hundred times!" // That evening {he} met {a_third} named {G}, who was very good at
  {doing}. "Please teach me," said {H}.
- "The secret is to go slowly," said {G}. "[Do a little every day|Start with one small step|Do not
  think about the end]." // "Everyone is bad at first," said {G}. "Only those who stop stay bad."
- So {H} practiced every [morning|evening|day] [beside|near] the {spot2}. The first day was hard.
  The second day was a little better. // Day after day, {H} practiced. Sometimes {he} failed, and
  sometimes {he} laughed about it, but {he} did not stop.
- +
- After [two|three|four|many] weeks, {H} [called everyone to|invited everyone to|stood near] the
  {spot3}. {He} [closed {his} eyes|took a deep breath|counted to three] and began. // Then came the
  great day of the [summer|autumn|spring|winter] fair, and {H} stepped forward near the {spot3}.
- This time it worked! {He} could {skill} [as if {he} had always known how|better than anyone had
  expected]. // Nobody laughed now. They clapped and [cheered|shouted {his} name], because {he}
  could {skill} at last.
- "You did it!" said {G}. "We did it," said {H}. // {G} winked from the back of the crowd.
moral: And {H} knew that every expert was a beginner once. // From then on, whenever something was
  hard, {H} said, "Not yet," and tried again. // Now {H} teaches {doing} to everyone who is not
  afraid to fail.

# sharing
- {Day}, {H} made {a_food}. It smelled [wonderful|so good that even the birds came closer]. //
  {Day}, {his} {relative} gave {H} {a_food}. // {Day}, {H} set out for {place} with {a_food} for
  lunch.
- {He} wanted to eat it all alone near the {spot1}. // {He} sat down beside the {spot1} and was
  about to take the first bite. // {He} had waited for this all [day|week], and {he} was very
  hungry.
- +
- Then {he} saw {a_third}, thin and tired. "My name is {G}," said the {gkind}, "and I have not eaten
  since yesterday." // But behind the {spot1} sat {a_third} named {G}, who looked at the food and
  said nothing.
- {H} looked at the food. There was not very much. {His} own stomach was empty, too. // {H} thought
  about it. If {he} shared, {he} might still be hungry. If {he} did not, {G} would be.
- Then {he} [smiled|nodded] and [broke it in two|gave {ghim} the bigger half]. "Food tastes better
  in good company," {he} said. // "Sit down," said {H}. "There is enough for two."
- {G} ate every crumb. "You have a good heart," {ghe} said, and {ghe} [gave {him} {a_thing}|told
  {him} stories until sunset|promised to remember it]. // They ate and talked, and {H} was
  surprised: half of the food had made {him} twice as happy.
- +
- That [winter|autumn|spring], {H} got lost {in_place}. {He} was cold, and it was getting dark near
  the {spot2}. // Some weeks later, {H} fell and hurt {his} leg near the {spot2}. Nobody seemed to
  hear {him}.
- Suddenly a light came closer. It was {G}! "I know the way," said {ghe}, and {ghe} [led {him}
  home|carried {him} home]. // But somebody did hear. {G} came running, and {ghe} brought warm soup
  and a blanket.
- "You shared with me when I had nothing," said {G}. "Now it is my turn." // "How did you find me?"
  asked {H}. "I never stopped looking out for you," said {G}.
moral: Kindness has a way of coming back. // And from that day on, they always ate together. // And
  {H} knew that a shared meal is never a small one.

# a quarrel
- {Day}, {H} and {F} found {a_thing} near the {spot1}. // {Day}, {H} and {F} saw {a_thing} lying
  beside the {spot1}.
- "I saw it first!" said {H}. "No, I did!" said {F}. // Both of them wanted to keep it. "It is
  mine," said {H}. "It is not," said {F}.
- {H} pulled on one side and {F} pulled on the other. With a [loud crack|sad little sound], the
  {thing} broke in two. // They pulled and pushed, and then it happened: the {thing} fell down and
  broke.
- +
- "Look what you did!" they both shouted, and they went home [angry|without another word]. // {F}
  turned red and ran away. {H} stamped {his} foot and went home, too.
- But the [evening|house] was very quiet. {H} [ate {his} {food} alone|could not sleep|looked out of
  the window], and {he} thought about all the good days with {F}. // At first {H} was angry. Then
  {he} was sad. A broken {thing} was bad, but a lost friend was much worse.
- Early in the morning {he} [went back to|walked to] the {spot1} and picked up the pieces. // {He}
  took [some glue|some string|a needle and thread] and set out to find the pieces.
- +
- And who was there already? It was {F}. "I am sorry," they said at the same moment, and then they
  [laughed|both had to smile]. // When {he} got there, {F} was sitting near the {spot2} with the
  pieces in {fhis} hands. "I am sorry," said {H}. "I am sorry, too," said {F}.
- Together they mended the {thing}. It was [a little crooked|not perfect], but they liked it even
  better than before. // They sat down and fixed the {thing}, piece by piece. It took the whole
  morning, and they talked the whole time.
- "You can have it on Mondays," said {H}. "And we can both have it on Sundays," said {F}. // "Let us
  give it to someone who needs it," said {F}. So they gave the {thing} to {a_third} named {G}, who
  was very happy.
moral: After that, the two friends still argued now and then, but never for long. // And they agreed
  that no {thing} in the world was worth a friend. // It is easy to break a thing, but it is
  wonderful to mend it together.

# a sound in the night
- {Day}, {H} went to bed early. In the middle of the night, {he} heard a strange sound. // {Day}, a
  strange sound came from the {spot1}. // {Day}, {H} could not sleep, because something outside went
  [tap, tap, tap|scratch, scratch|whoo, whoo].
- It came from the {spot1}. // "Who is there?" {he} called, but nobody answered. // {He} pulled the
  blanket over {his} head, but the sound did not stop.
- {H} was afraid, so {he} [ran to|woke up|called] {F}. "Maybe it is a monster," {he} whispered. //
  {H} lit {his} lantern and went to get {F}. "Did you hear that?" {he} asked.
- +
- "There is only one way to find out," said {F}. They [took|held] each other's hands and walked into
  the dark. // "I am scared, too," said {F}, "but let us be scared together."
- They crept past the {spot2}. [A branch snapped|An owl called|The wind sighed], and they almost
  turned back. // Step by step they came closer. The shadows of the {spot2} looked like long
  fingers.
- The sound grew louder. {H} lifted the light with a shaking hand, and [then|at last] {he} saw it.
- +
- It was no monster at all. It was {a_third}, very small and very frightened. "My name is {G}," said
  the {gkind}. "I am stuck, and I want to go home." // There was only {a_third} named {G}, caught
  between two stones. "Please help me," {ghe} said. "I thought that you were monsters!"
- {H} and {F} [laughed|smiled] and pulled {ghim} free. // "We were afraid of you," said {H}, "and
  you were afraid of us!" Then they set {ghim} free.
- They walked {G} home, all the way to the {spot3}, where {ghis} family was waiting. // They gave
  {G} {a_food} and brought {ghim} home before sunrise.
moral: Since that night, {H} has not been afraid of strange sounds. // {H} learned that things look
  bigger in the dark, and friends do, too. // Then {H} went back to bed and slept until noon.

# a present
- {F} had a birthday soon, and {H} wanted to give {fhim} something special. // {Day}, {H} remembered
  that tomorrow was the birthday of {F}.
- But {he} had no money, only [two buttons and a piece of string|three old coins|some {clutter} in
  {his} pocket]. // In the shop window {he} saw {a_thing}, but it cost far too much.
- {H} walked up and down {place} and thought. // {He} sat down near the {spot1} and put {his} head
  in {his} hands.
- +
- There {he} met {a_third} named {G}. "Why so gloomy?" asked the {gkind}. // {G}, {a_third}, came by
  with a heavy load and dropped half of it. {H} helped {ghim} to pick it up.
- {H} told {ghim} about the birthday. "The best presents are not bought," said {G}. "They are made."
  // "What does your friend like most?" asked {G}. {H} thought of [songs|stars|flowers|stories], and
  suddenly {he} had an idea.
- So {he} worked all night. {He} used [wood|paper|old cloth] from the {spot2} and some {clutter},
  and {he} made {a_thing}. // All day long {he} collected things near the {spot2}. Then {he} cut and
  glued and painted until it was done: {a_thing}, made by hand.
- +
- On the birthday, the others brought big boxes with bows. {H} felt [small|shy] with {his} little
  parcel. // The party was near the {spot3}, with music and {food_plain} for everyone. {H} was the
  last to give a present.
- {F} opened it, and for a moment {fhe} did not say a word. "You made this for me?" {fhe} asked. //
  When {F} saw the {color} {thing}, {fhis} eyes grew [wide|wet].
- "It is the best present that I have ever had," {fhe} said[, and everyone could see that it was
  true|]. // {F} hugged {H} so hard that {he} could hardly breathe.
moral: And the {thing} has stood beside {fhis} bed ever since. // It had cost nothing at all, and it
  was worth more than gold. // After the party, they sat together and watched the stars come out.

# a rescue
- {Day}, {H} was walking past the {spot1} when {he} heard a cry for help. // {Day}, {H} was on {his}
  way to the {spot1} when someone shouted, "Help! Help!"
- {A_third} named {G} had fallen into a deep hole and could not get out. // {A_third} named {G} was
  stuck on a high ledge and did not dare to move. // {A_third} named {G} had sunk into the mud up to
  the neck.
- "Hold on!" called {H}. "I will get you out." // "Do not be afraid," said {H}. "I am here now."
- +
- First {he} reached out {his} hand, but it was too short. Then {he} tried a branch, but the branch
  broke. // {He} pulled as hard as {he} could, but {he} was not strong enough.
- {H} ran to fetch {F}. They tried together, but it did not work. // {F} heard the noise and came to
  help. Even the two of them could not do it.
- "Think," {H} told {himself}. "What do we have?" {He} looked around and saw {a_thing}, a long rope
  and the {spot2}. // "We do not need more strength," said {F}. "We need a better idea."
- +
- Then {H} had an idea. {He} tied the rope to the {spot2}, threw the other end to {G} and [pulled
  slowly|counted to three]. // "A rope!" cried {H}. They tied one end around the {spot2}, and {G}
  held on to the other.
- Bit by bit, {G} came up, and at last {ghe} was safe on firm ground. // With a [pop|great
  splash|loud cheer], {G} was free!
- "You saved me," said {G}, and {ghe} [wiped away a tear|gave {him} {a_thing2}|bowed low]. "How did
  you think of it?" "I stopped pulling," said {H}, "and started thinking." // {G} thanked them both
  and invited them to share {a_food}.
moral: The story of the rescue is still told {in_place}. // From then on, {H} always carried a rope,
  just in case. // And {H} learned that a good idea can be stronger than ten strong arms.

# a race
- Every year there was a great race from the {spot1} to the {spot3}. // {Day}, everyone {in_place}
  was talking about the great race.
- {H} wanted to win it, but {he} was [not very fast|smaller than the others|the slowest of all]. //
  "You will come in last," said {a_third} named {gname_as}, who had won the year before.
- {He} trained every morning with {F}, who [ran beside {him}|counted the seconds|shouted,
  "Faster!"]. // "Just do your best," said {F}. "That is all anyone can do."
- +
- The day came, and the runners stood in a row. "Ready, set, go!" // A bell rang, and the race
  began.
- {G}, the proud {gkind}, shot ahead, and {H} was soon far behind. // {G}, the fast {gkind}, was
  first right from the start. {H} kept running at {his} own pace.
- But near the {spot2}, {H} saw {G} lying on the ground. {Ghe} had [hurt {ghis} foot|slipped on the
  {clutter}], and the others just ran past. // But at the {spot2}, {G} slipped on the {clutter} and
  could not get up. Nobody stopped to help.
- +
- {H} could have run on, too. Instead {he} stopped. "Lean on me," {he} said. // {H} looked at the
  road, and then {he} looked at {G}. {He} turned around and gave {ghim} a hand.
- Slowly they walked to the end, side by side. They were the very last, but the crowd cheered louder
  than ever. // When they came to the {spot3}, the race was long over. But everyone stood up and
  clapped.
- "I was unkind to you," said {G}. "You are the real winner." // {G} gave {him} {ghis} old medal.
  "It belongs to you," {ghe} said.
moral: {H} did not win the race that day, but {he} won a friend. // {F} was prouder than if {he} had
  come in first. // The name of the winner was soon forgotten, but nobody forgot what {H} did.

# an old map
- {Day}, {H} found an old map between the pages of a dusty book. // {Day}, an old map fell out of a
  book that had belonged to {his} {relative}.
- It showed {place}, and there was a red cross near the {spot3}. // A dotted line led from the
  {spot1} to the {spot3}, and there was a big red cross at the end.
- "A treasure!" cried {H}, and {he} ran to tell {F}. // {H} showed it to {F}. "Do you think that it
  is real?" {he} asked. "Let us find out," said {F}.
- +
- They packed {a_food} and a lantern and started at the {spot1}. // At the {spot1} they counted ten
  steps to the north and twenty steps to the east.
- Soon they came to the {spot2}, where {a_third} named {G} blocked the way. "Answer my riddle," said
  {G}. "What gets bigger the more you take away?" // At the {spot2}, the path was gone. {A_third}
  named {G} was sitting there. "Answer my riddle and I will show you the way," {ghe} said. "What has
  teeth but cannot bite?"
- {riddle_answer}
- +
- At last they reached the {spot3}. They dug and dug until they hit something hard. // The way was
  long, but before sunset they stood at the {spot3}, and they began to dig.
- It was a small chest. There was no gold in it, only [seeds|letters|old drawings|a book of songs]
  and a note. // They opened a rusty box. Inside were {a_thing2} and a note.
- The note said, "The treasure is the friend who came with you." {H} looked at {F}, and they both
  laughed. // "Whoever reads this," said the note, "has already had the best part: the journey."
moral: They hung the map on the wall, and they still go looking for new adventures. // And {H}
  thought that {he} had never found anything better. // It was late when they came home, tired,
  dirty and very happy.

# a seed
with: a_plant=a rose; fruit=a deep red rose
with: a_plant=a pumpkin; fruit=the biggest pumpkin {in_place}
with: a_plant=a sunflower; fruit=a flower as bright as the sun
with: a_plant=an apple tree; fruit=one perfect apple
with: a_plant=a strawberry; fruit=a handful of sweet strawberries
with: a_plant=a bean; fruit=a vine that reached the roof
with: a_plant=a tulip; fruit=a purple tulip
- {Day}, {G}, {a_third}, gave {H} a tiny seed. "This is {a_plant}," {ghe} said. // {Day}, {H} traded
  {his} {color} {thing} for a tiny seed. "It will be {a_plant}," promised {a_third} named {G}.
- {H} planted it beside the {spot1} and gave it some water. // {H} dug a hole near the {spot1}, put
  the seed in and covered it with earth.
- Then {he} waited. An hour went by. A whole day went by. Nothing happened. // The next morning {he}
  ran out to look, but there was nothing but brown earth.
- +
- "Grow!" {he} shouted at the ground. It did not help. // {He} sang to it. {He} danced around it.
  {He} even read it a story. But nothing came up.
- "This seed is broken," said {H}. "[No|Not at all]," said {G}. "It is busy. You just cannot see it
  yet." // "Maybe I should dig it up," {H} said to {G}. "If you do that, it will never grow," {ghe}
  answered. "Be patient."
- So every day {H} watered the seed and pulled out the weeds. [Rain came, and sun came|Weeks went
  by]. // {H} kept on watering, even when it was hot, and even when {he} would rather have played
  near the {spot2}.
- +
- And then, one [quiet|misty|golden] morning, there was a small green leaf. {H} was so happy that
  {he} [danced|turned a somersault|woke up everybody]. // At last a tiny green tip looked out of the
  earth. "Hello," whispered {H}.
- The plant grew and grew. By the end of summer it had given {him} {fruit}. // Week after week it
  grew taller, until one day there was {fruit}.
- {H} shared it with {G} and kept one seed for the next year. // "You see," said {G}, "you did not
  make it grow. You let it grow."
moral: And {H} learned that good things take time. // Now {he} always has a seed in {his} pocket for
  someone who is in a hurry. // If you go there today, you can still see it next to the {spot1}.

# telling the truth
- {Day}, {H} was playing in the house of {F} and broke {a_thing}. // {Day}, {H} borrowed {a_thing}
  from {F} without asking, and {he} broke it. // {Day}, {H} ran too fast and knocked over {a_thing}
  that belonged to {F}.
- Nobody had seen it. Quickly {he} hid the pieces behind the {spot1}. // {H} looked left and right.
  Then {he} buried the pieces near the {spot1}.
- "Have you seen my {thing}?" asked {F} later. "No," said {H}, and {his} face felt hot. // When {F}
  asked about it, {H} said, "Maybe the wind took it."
- +
- {F} searched everywhere, near the {spot2} and near the {spot3}, and {H} felt worse and worse. //
  That night {H} could not sleep. The lie sat in {his} stomach like a cold stone.
- {F} even thought that {a_third} named {G} had taken it, and {fhe} got angry with {ghim}. That was
  too much for {H}. // "A lie is like a snowball," said {G}, {a_third} who noticed how sad {he} was.
  "The longer you roll it, the bigger it gets."
- {He} got the pieces and went to {F} with [shaking|slow] steps. // In the morning {he} took all
  {his} courage and knocked on the door.
- +
- "I broke your {thing}," said {H}, "and then I lied. I am very sorry." // "It was me," said {H},
  and [the tears came|{he} could not look up]. "I was afraid that you would not like me anymore."
- {F} was quiet for a long time. "I am sad about the {thing}," {fhe} said, "but I am glad that you
  told me." // {F} took a deep breath. "That must have been hard to say," {fhe} said. "Thank you for
  the truth."
- {H} worked for a whole week and bought {fhim} a new {thing}. // Together they glued the pieces,
  and you could hardly see the cracks.
moral: And that night {H} slept better than ever before. // From that day on, {H} told the truth,
  even when it was hard. // A {thing} can be replaced, but trust has to be earned.

# a wish
- {Day}, {H} saw a star fall behind the {spot1}. // {Day}, {H} found a [glowing|strange|warm] stone
  near the {spot1}.
- {He} ran to look. There stood {a_third} in a circle of light. "I am {G}," said the {gkind}, "and I
  can give you one wish." // When {he} picked it up, {a_third} appeared. "My name is {G}," said the
  {gkind}. "You have one wish. Choose well."
- +
- {H} thought of many things. {He} thought of {a_thing}, of a mountain of {food_plain}, and of a
  house as big as a castle. // "I could be rich," thought {H}. "I could be famous. I could fly like
  a bird!"
- But then {he} remembered {F}, who had been [ill|sad] for weeks. // But on the way home {he} passed
  the house of {F}, who was sick in bed and could not come out to play.
- {F} [did not laugh anymore|had grown pale and thin|only looked out of the window], and nobody knew
  how to help.
- +
- "I know my wish," said {H}. "I want {F} to be well again." // {H} closed {his} eyes. "Please make
  my friend happy and healthy," {he} said.
- {G} was surprised. "You want nothing for yourself?" "That is for myself," said {H}. // "Most
  people wish for gold," said {G}, and {ghe} smiled for the first time in a hundred years.
- The light [flashed|grew bright|danced in the air], and then it was gone. The next morning {F} came
  running down the road. // A warm wind blew through {place}. When {H} came home, {F} was standing
  at the door, laughing.
- They [ran to|danced around|raced to] the {spot2} and played until it was dark. // "Let us go
  outside!" said {F}, and they did not come home before the stars were out.
moral: {H} never told {F} about the wish. // And sometimes, when a star falls, {H} still says thank
  you. // Of all the wishes in the world, {he} had found the best one.

# a dark tunnel
- {Day}, {H} and {F} wanted to see what was on the other side of the hill. // {Day}, {H} and {F} set
  out to visit {a_third} named {gname_as}, who lived on the other side of the hill.
- The only way led through a long, dark tunnel near the {spot1}. // Behind the {spot1} they came to
  a dark tunnel. There was no other way.
- "I am not going in there," said {H}, and {his} knees shook. // {H} looked into the dark and took
  one step back. "You go first," {he} said.
- +
- "What are you afraid of?" asked {F}. "Of everything that I cannot see," said {H}. // {F} did not
  laugh. "I was afraid of water once," {fhe} said. "Then I put one toe in, and after that one foot."
- {F} took {a_thing} out of {fhis} bag. "Hold this," {fhe} said. "It always makes me feel brave." //
  "We can sing," said {F}. "Nobody can be very afraid while singing."
- So they went in, one step and then another. Water dripped, and something [rustled|squeaked|flew
  past]. // They walked slowly. It was cold, and their steps echoed from the walls.
- +
- In the middle, {F} stumbled and the light went out. Now it was {H} who said, "Give me your hand. I
  know the way." // Suddenly {F} stopped. "Now I am afraid, too," {fhe} whispered. "Then I will go
  first," said {H}, and {he} was surprised by {his} own voice.
- At last they saw a small white spot. It grew and grew, and then they stood in the warm sun. //
  Around the next bend there was light, and soon they could smell [grass|the sea|fresh bread].
- There were [a thousand butterflies|hills as far as they could see|wild strawberries everywhere],
  and {G}, the {gkind}, waved to them from far away. // {G}, the {gkind}, was waiting on the other
  side with {a_food}. "Were you not afraid?" {ghe} asked. "Yes," said {H}, "but I came anyway."
moral: On the way back, {H} went first. // Being brave, {H} found, does not mean that you have no
  fear. // Since then the tunnel has not seemed half as long.
"""

RIDDLE = """
- {H} and {F} whispered to each other. "A {riddle}!" they said, and {G} let them pass. // "A
  {riddle}!" said {F} at once. {G} [clapped|bowed|smiled] and showed them the way. // {H} thought
  hard. "It is a {riddle}," {he} said at last, and {G} stepped aside.
"""
RIDDLES = {"bigger": "hole", "teeth": "comb"}

CLOSING = """
- The end. // // //
"""

Beat = tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """One kind of story: its beats in order ("+" starts a paragraph), morals and extra values."""

    topic: str
    beats: tuple[Beat, ...]
    morals: Beat
    extras: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Being:
    """Somebody in a story."""

    name: str
    kind: str
    trait: str
    pronoun: str


@dataclass(frozen=True)
class Story:
    """A finished story and what one could have asked for to get it."""

    text: str
    hero: Being
    friend: Being
    thing: str
    place: str
    topic: str


def parse_beats(text: str) -> tuple[Beat, ...]:
    """Split a block of "- " lines into beats and their alternatives."""
    joined = re.sub(r"\n\s+", " ", text.strip())
    lines = [line[1:].strip() for line in joined.split("\n") if line.startswith("-")]
    return tuple(tuple(part.strip() for part in f"{line} ".split("//")) for line in lines)


def parse_plots(text: str) -> tuple[Plot, ...]:
    """Read the plots above."""
    plots = []
    for block in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        topic, body = block.split("\n", 1)
        body, moral = body.split("moral: ")
        extras = tuple(
            dict(pair.split("=") for pair in line.removeprefix("with: ").split("; "))
            for line in body.split("\n")
            if line.startswith("with: ")
        )
        morals = parse_beats(f"- {moral}")[0]
        plots.append(Plot(topic.strip(), parse_beats(body), morals, extras or ({},)))
    return tuple(plots)


def parse_places(text: str) -> tuple[tuple[str, str, list[str], str], ...]:
    """Read the table of places."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().split("\n")]
    return tuple((name, inside, spots.split(", "), lies) for name, inside, spots, lies in rows)


ALL_PLOTS = parse_plots(PLOTS)
ALL_PLACES = parse_places(PLACES)
PARSED = {
    name: parse_beats(text)
    for name, text in (("opening", OPENING), ("home", HOME), ("friend", FRIEND_INTRO),
                       ("first", FIRST_DAY), ("next", NEXT_DAY), ("riddle", RIDDLE),
                       ("closing", CLOSING))
}  # fmt: skip

CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(template: str, values: dict[str, str], rng: random.Random) -> str:
    """Resolve every [a|b] in a template, then fill in the {names}."""
    while "[" in template or "{" in template:
        while "[" in template:
            template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
        template = template.format_map(values)
    return " ".join(template.split())


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    an = phrase[0] in "aeio" or phrase.startswith(("um", "un")) != phrase.startswith("uni")
    an = an or phrase.startswith("honest")
    return f"{'an' if an else 'a'} {phrase}"


def draw_being(rng: random.Random, taken: Sequence[Being]) -> Being:
    """Somebody whose name and kind are not taken yet."""
    while True:
        group = rng.choice((ANIMALS, ANIMALS, PEOPLE, FANTASY, tuple(GENDERED)))
        kind = rng.choice(group)
        pronoun = GENDERED.get(kind) or rng.choice(("he", "she"))
        name = rng.choice(MALE if pronoun == "he" else FEMALE)
        if all(name != other.name and kind != other.kind for other in taken):
            return Being(name, kind, rng.choice(TRAITS), pronoun)


def pronouns(being: Being, prefix: str) -> dict[str, str]:
    """The values {he}, {him}, {his}, {He}, {His} and so on, with a prefix for other characters."""
    forms = ("he", "him", "his", "himself")
    actual = forms if being.pronoun == "he" else ("she", "her", "her", "herself")
    values = {prefix + form: word for form, word in zip(forms, actual, strict=True)}
    capital = {(prefix + form).capitalize(): word.capitalize()
               for form, word in zip(forms, actual, strict=True)}  # fmt: skip
    return values | capital


def cast_values(being: Being, letter: str, role: str, prefix: str) -> dict[str, str]:
    """Everything that templates can say about one character."""
    phrase = article(f"{being.trait} {being.kind}")
    return pronouns(being, prefix) | {
        letter: being.name,
        f"{prefix}kind": being.kind,
        f"{prefix}name_as": being.name,
        f"a_{role}": phrase,
        f"A_{role}": phrase.capitalize(),
    }


def tell_story(rng: random.Random) -> Story:
    """Tell one story; about one in five has two episodes."""
    hero = draw_being(rng, ())
    friend = draw_being(rng, (hero,))
    place, in_place, spots, clutter = rng.choice(ALL_PLACES)
    plots = rng.sample(ALL_PLOTS, 2 if rng.random() < 0.2 else 1)
    if any(plot.topic == "a new friend" for plot in plots):  # begins without any friend
        plots = plots[:1]
    values = cast_values(hero, "H", "hero", "") | cast_values(friend, "F", "friend", "f")
    values |= {"him_f": values["fhim"], "place": place, "in_place": in_place, "clutter": clutter}
    values["trait2"] = rng.choice(COMPARABLE)
    values["home"] = rng.choice(PARSED["home"][0])
    values["friend_intro"] = ""
    if any("{F}" in alternative for plot in plots for beat in plot.beats for alternative in beat):
        values["friend_intro"] = rng.choice(PARSED["friend"][0])
    home, *others = rng.sample(spots, len(spots))
    values["spot0"] = home
    paragraphs: list[list[str]] = [[]]
    cast = [hero, friend]
    first_thing = ""

    def add(beat: Beat) -> None:
        sentence = expand(rng.choice(beat), values, rng)
        if sentence == "+":
            paragraphs.append([])
        elif sentence:
            paragraphs[-1].append(sentence)

    for number, plot in enumerate(plots):
        third = draw_being(rng, cast)
        cast.append(third)
        colors, things = rng.sample(COLORS, 2), rng.sample(THINGS, 2)
        first_thing = first_thing or things[0]
        food = rng.choice(FOODS)
        values |= cast_values(third, "G", "third", "g")
        values |= {
            "Day": expand(rng.choice(PARSED["next" if number else "first"][0]), values, rng),
            "color": colors[0],
            "thing": things[0],
            "a_thing": article(f"{colors[0]} {things[0]}"),
            "a_thing2": article(f"{colors[1]} {things[1]}"),
            "food": food,
            "a_food": article(food),
            "food_plain": rng.choice(("cake", "cookies", "honey", "berries", "sweet buns")),
            "relative": rng.choice(RELATIVES),
        }
        values |= dict(zip(("spot1", "spot2", "spot3"), rng.sample(others, 3), strict=True))
        values |= rng.choice(plot.extras)
        if number == 0:
            for beat in PARSED["opening"]:
                add(beat)
        paragraphs.append([])
        for beat in plot.beats:
            if beat == ("{riddle_answer}",):
                asked = " ".join(paragraphs[-1])
                values["riddle"] = next(RIDDLES[word] for word in RIDDLES if word in asked)
                beat = PARSED["riddle"][0]
            add(beat)
        add(plot.morals)
    add(PARSED["closing"][0])
    text = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph)
    return Story(text, hero, friend, first_thing, place, plots[0].topic)


def story(rng: random.Random) -> Doc:
    """A story in plain text."""
    return [(tell_story(rng).text + END, True)]


ASK_STORY = (
    "Tell me a story.",
    "Tell me a story about {a_kind}.",
    "Tell me a story about {a_kind}.",
    "Tell me a story about {a_kind}.",
    "Tell me a short story about {a_kind}.",
    "tell me a story about {a_kind}",
    "Tell me a story about {a_kind} named {name}.",
    "Tell me a story about {a_kind} and {a_friend}.",
    "Tell me a story about {topic}.",
    "Tell me a story about {a_thing}.",
    "Tell me a story about {name}.",
    "Write a story about {a_kind}.",
    "Write a short story about {a_kind} named {name}.",
    "Write a story about {a_kind} in {place}.",
    "Can you tell me a story about {a_kind}?",
    "Please tell me a story about {a_kind}.",
    "I would like to hear a story about {a_kind}.",
    "Do you know a story about {a_kind}?",
)


def story_turn(rng: random.Random) -> tuple[str, str]:
    """A wish for a story, and the story."""
    told = tell_story(rng)
    ask = rng.choice(ASK_STORY)
    while "{a_friend}" in ask and told.friend.name not in told.text:
        ask = rng.choice(ASK_STORY)
    if "{a_thing}" in ask and f" {told.thing}" not in told.text:
        ask = ASK_STORY[1]
    values = {"a_kind": article(told.hero.kind), "name": told.hero.name, "place": told.place,
              "a_friend": article(told.friend.kind), "topic": told.topic,
              "a_thing": article(told.thing)}  # fmt: skip
    return ask.format_map(values), told.text


def sentences(rng: random.Random) -> list[str]:
    """Short sentences from a fresh story, for copying."""
    found = re.findall(r"[A-Z][a-z ,']+\.", tell_story(rng).text)
    return [sentence for sentence in found if len(sentence) < 80] or ["Hello there!"]


WORDS = sorted(
    {
        word
        for source in (PLOTS, OPENING, PLACES, *KINDS, *THINGS, *TRAITS, *FEMALE, *MALE)
        for word in re.findall(r"(?<![{\w'])[A-Za-z][a-z]{2,}(?![}\w'=])", source)
    }
)


# --- Small talk -----------------------------------------------------------------------------------

ABOUT = (
    "I am the Reprise demo model, a tiny language model. I can tell short stories, add two numbers "
    "and repeat what you say."
)
CANNOT = (
    "I am too small to know that. I can tell short stories, add two numbers and repeat what you "
    "say."
)
SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hi // Hi // Hi! // hello // Hello // Hello! // hey // Hey there // Hi there! // Good morning"
     " // Good evening // hello, how are you // Hello again", (
        "Hello! Would you like to hear a story?",
        "Hello! I can tell you a story, add two numbers or repeat what you say.",
        "Hi there! What can I do for you?")),
    ("who are you? // Who are you? // What are you? // what is your name? // What is your name?"
     " // Tell me about yourself. // Introduce yourself. // Are you a robot? // What model are you?"
     " // Who made you?", (ABOUT,)),
    ("What can you do? // what can you do // Help // help // Can you help me? // What do you know?",
     ("I can tell short stories, add two numbers and repeat what you say."
      " Try: Tell me a story about a fox.",)),
    ("How are you? // how are you // How do you do? // How is it going?",
     ("I am fine, thank you! Would you like to hear a story?",)),
    ("Thank you // Thank you! // thanks // Thanks! // thank you very much // Great, thank you!",
     ("You are welcome!",)),
    ("Bye // bye // Goodbye! // Good night // See you later", ("Goodbye! Come back soon.",)),
    ("Good job! // Well done // That was nice // I like it // nice // wow // Great story!",
     ("Thank you! I am happy that you like it.",)),
    ("ok // OK // yes // no // hmm", ("Would you like to hear a story?",)),
)  # fmt: skip

FOREIGN_QUESTIONS = (
    "What is the capital of {topic}?",
    "Where is {topic}?",
    "Who was the first king of {topic}?",
    "How many people live in {topic}?",
    "Tell me about {topic}.",
    "Explain {topic}.",
    "What is {topic}?",
    "How does {topic} work?",
    "Why is {topic} important?",
    "Write a poem about {topic}.",
    "Write a program about {topic}.",
    "Translate {topic} to German.",
    "What is the weather in {topic}?",
    "What do you think about {topic}?",
    "What is {a} - {b}?",
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "What is {a} minus {b}?",
    "What is {a} divided by {b}?",
)
FOREIGN_TOPICS = phrases(
    "France // Germany // China // Japan // India // Brazil // Egypt // London // Paris // Tokyo"
    " // physics // music // history // the moon // the sun // gravity // electricity // football"
    " // a computer // Python // love // life // time // money // science // space // chess // art"
    " // the internet // an engine // a graph // a GPU // machine learning // the ocean // Mars"
)


def small_turn(rng: random.Random) -> tuple[str, str]:
    """A greeting, a question about the model, or one that it cannot answer."""
    if rng.random() < 0.6:
        questions, answers = rng.choice(SMALL_TALK)
        return rng.choice(questions.split(" // ")), rng.choice(answers)
    values = {"topic": rng.choice(FOREIGN_TOPICS), "a": rng.randint(1, 99), "b": rng.randint(1, 99)}
    return rng.choice(FOREIGN_QUESTIONS).format_map(values), CANNOT


# --- Chat -----------------------------------------------------------------------------------------

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the Reprise demo model.",
    "You are a friendly storyteller.",
    "Answer briefly.",
)


def chat(turns: Sequence[tuple[str, str]], system: str | None = None) -> Doc:
    """A conversation as the chat template writes it; only the answers are learned."""
    doc: Doc = []
    lead = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    for question, answer in turns:
        ask = f"{lead}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        doc += [(ask, False), (answer + TURN_END, True)]
        lead = "\n"
    return [*doc, (f"\n{END}", True)]


Turn = Callable[[random.Random], tuple[str, str]]


def single(turn: Turn, rng: random.Random) -> Doc:
    """A chat of one question and one answer."""
    return chat([turn(rng)], rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None)


def sum_chat(rng: random.Random) -> Doc:
    """A chat about a sum."""
    return single(sum_turn, rng)


def copy_chat(rng: random.Random) -> Doc:
    """A chat that repeats something."""
    return single(copy_turn, rng)


def story_chat(rng: random.Random) -> Doc:
    """A chat that asks for a story."""
    return single(story_turn, rng)


def small_chat(rng: random.Random) -> Doc:
    """A chat of greetings and the like."""
    return single(small_turn, rng)


def long_chat(rng: random.Random) -> Doc:
    """A conversation of two to six turns that mixes everything."""
    kinds: list[Turn] = rng.choices(
        (small_turn, sum_turn, copy_turn, story_turn), (4, 6, 3, 2), k=rng.randint(2, 6)
    )
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else None
    return chat([turn(rng) for turn in kinds], system)


# --- Documents to tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A kind of document, its share of the training tokens, and how many are made."""

    make: Callable[[random.Random], Doc]
    share: float
    pool: int


TASKS = {
    "story": Task(story, 0.37, 150_000),
    "story_chat": Task(story_chat, 0.13, 50_000),
    "addition": Task(addition, 0.15, 120_000),
    "sum_chat": Task(sum_chat, 0.12, 200_000),
    "copying": Task(copying, 0.08, 200_000),
    "copy_chat": Task(copy_chat, 0.06, 120_000),
    "small_chat": Task(small_chat, 0.02, 8_000),
    "long_chat": Task(long_chat, 0.07, 25_000),
}


def make_rng(*key: object) -> random.Random:
    """A generator that depends on the seed and the key alone, not on who calls it when."""
    return random.Random("/".join(map(str, (SEED, *key))))


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE on a sample of every task: any text round-trips, every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = make_rng("tokenizer")
    makers = [story] * 8 + [addition, story_chat, copying, copying, copy_chat, small_chat]
    texts = (re.sub(r"<\|\w+\|>", "\n", text)
             for _ in range(400) for make in makers for text, _ in make(rng))  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Pool:
    """Tokenized documents end to end: ids, whether each id is learned, and document lengths."""

    ids: np.ndarray
    learned: np.ndarray
    lengths: np.ndarray


def make_pool(job: tuple[str, int, int, str]) -> Pool:
    """Generate and tokenize one chunk of one task."""
    import numpy as np
    from tokenizers import Tokenizer

    name, chunk, count, tokenizer_json = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = make_rng(name, chunk)
    docs = [TASKS[name].make(rng) for _ in range(count)]
    segments = [segment for doc in docs for segment in doc]
    pieces = [e.ids for e in tokenizer.encode_batch_fast([text for text, _ in segments])]
    sizes = np.array([len(piece) for piece in pieces])
    flags = np.array([learned for _, learned in segments])
    ends = np.cumsum([len(doc) for doc in docs])
    return Pool(
        ids=np.fromiter((i for piece in pieces for i in piece), np.int16, int(sizes.sum())),
        learned=np.repeat(flags, sizes),
        lengths=np.add.reduceat(sizes, np.concatenate(([0], ends[:-1]))),
    )


def build_stream(tokenizer: Tokenizer, tokens: int, scale: float, workers: int) -> Pool:
    """All tasks mixed by their shares into one shuffled stream of about `tokens` tokens."""
    import numpy as np

    text = tokenizer.to_str()
    chunk = 1000
    jobs: list[tuple[str, int, int, str]] = []
    for name, task in TASKS.items():
        chunks = max(1, round(task.pool * scale / chunk))
        jobs += [(name, number, chunk, text) for number in range(chunks)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        parts = list(executor.map(make_pool, jobs))

    ids = np.concatenate([part.ids for part in parts])
    learned = np.concatenate([part.learned for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    owner = np.repeat([job[0] for job in jobs], [len(part.lengths) for part in parts])
    starts = np.cumsum(lengths) - lengths
    shuffle = np.random.default_rng(SEED)
    chosen = []
    for name, task in TASKS.items():
        docs = np.flatnonzero(owner == name)
        wanted = max(1, round(tokens * task.share / lengths[docs].mean()))
        rounds = -(-wanted // len(docs))
        order = np.concatenate([shuffle.permutation(docs) for _ in range(rounds)])
        chosen.append(order[:wanted])
    order = shuffle.permutation(np.concatenate(chosen))
    size = lengths[order]
    begin = np.cumsum(size) - size
    gather = np.arange(size.sum()) + np.repeat(starts[order] - begin, size)
    return Pool(ids[gather], learned[gather], size)


# --- Training -------------------------------------------------------------------------------------


def make_model() -> Qwen3ForCausalLM:
    """The model, with fresh weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=416,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how hard to train."""

    minutes: float
    steps: int
    batch_tokens: int
    row: int
    last_row: int
    learning_rate: float
    warmup: int
    compile: bool


class Batches:
    """Rows cut from the stream, on the device; each row starts where a document starts.

    In half of the rows a token sees its own document only, as it would in a fresh request. In the
    other half it sees everything before it, so that long contexts are trained as well.
    """

    def __init__(self, stream: Pool, device: torch.device) -> None:
        import torch

        self.ids = torch.from_numpy(stream.ids).to(device)
        self.learned = torch.from_numpy(stream.learned).to(device)
        self.starts = torch.from_numpy(stream.lengths).to(device).cumsum(0)[:-1]
        self.device = device

    def draw(self, rows: int, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, labels (-100 where nothing is learned) and the attention mask."""
        import torch

        fits = int(torch.searchsorted(self.starts, len(self.ids) - row - 1))
        first = self.starts[torch.randint(fits, (rows,), device=self.device)]
        where = first[:, None] + torch.arange(row + 1, device=self.device)
        tokens = self.ids[where].long()
        inputs = tokens[:, :-1]
        labels = tokens[:, 1:].masked_fill(~self.learned[where[:, 1:]], -100)
        document = (inputs == 0).cumsum(1) - (inputs == 0).long()
        document[: rows // 2] = 0
        causal = torch.ones(row, row, dtype=torch.bool, device=self.device).tril()
        mask = (document[:, :, None] == document[:, None, :]) & causal
        return inputs, labels, mask[:, None]


def descend(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float, progress: float
) -> float:
    """Follow the gradients one step, and clear them.

    Args:
        model: Has the gradients.
        optimizer: Of its parameters.
        rate: At the top of a cosine.
        progress: From 0 to 1: how much of the cosine lies behind.

    Returns:
        The step's rate.
    """
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    rate *= 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate


def train(model: Qwen3ForCausalLM, stream: Pool, config: TrainConfig) -> dict[str, Any]:
    """Train in place until the steps or the minutes are used up, on a cosine that fits both."""
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    batches = Batches(stream, device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    if config.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    model.train()
    begin = time.perf_counter()
    step = tokens = 0
    progress = 0.0
    loss = torch.zeros(())
    while progress < 1:
        row = config.row if progress < 0.8 else config.last_row
        inputs, labels, mask = batches.draw(max(2, config.batch_tokens // row), row)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup)
        rate = descend(model, optimizer, rate, progress)
        step += 1
        tokens += inputs.numel()
        if step % 200 == 0 or step < 4:
            value = loss.item()
            seconds = time.perf_counter() - begin
            print(
                f"step {step}  loss {value:.4f}  lr {rate:.2e}  progress {progress:.2f}"
                f"  {seconds:.1f} s  {tokens / seconds / 1e3:.0f}k tokens/s",
                flush=True,
            )
        progress = max(step / config.steps, (time.perf_counter() - begin) / 60 / config.minutes)
    final = loss.item()
    seconds = time.perf_counter() - begin
    return {"steps": step, "tokens": tokens, "seconds": round(seconds, 1), "loss": round(final, 4)}


# --- Saving ---------------------------------------------------------------------------------------


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16, and the held-out additions beside it."""
    import torch
    from transformers import GenerationConfig

    out.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END)], pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Written by hand, as is the old place of rope_theta, so that older readers understand it, too.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": [TURN_START, TURN_END],
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
    config = json.loads((out / "config.json").read_text())
    write_json(out / "config.json", config | {"rope_theta": 10000.0})
    held_out = {
        "format": "{a} + {b} = {a+b}",
        "rule": "sha256('low+high') as a big-endian integer is divisible by 14; 10 <= a, b <= 99",
        "pairs": held_out_pairs(),
    }
    (out / "held_out_additions.json").write_text(json.dumps(held_out) + "\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# --- Scoring --------------------------------------------------------------------------------------


def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], limit: int
) -> list[str]:
    """Greedy continuations; text that does not stop within the limit ends in "..."."""
    device = next(model.parameters()).device
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    batch = batch.to(device)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=limit,
        do_sample=False,
    )
    answers = []
    for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :]):
        answer, *stopped = re.split(r"<\|(?:endoftext|im_end)\|>", text, maxsplit=1)
        answers.append(answer if stopped else f"{answer}...")
    return answers


def ask(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """A one-turn chat prompt."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == chat([(question, "")])[0][0], "the template and the training text differ"
    return str(prompt)


def exact(answers: Sequence[str], expected: Sequence[str]) -> tuple[float, list[tuple[str, str]]]:
    """The share of exact answers, and a few misses as (got, expected)."""
    pairs = list(zip(answers, expected, strict=True))
    misses = [(got, want) for got, want in pairs if got != want]
    return 1 - len(misses) / len(pairs), misses[:3]


def perplexity(model: Qwen3ForCausalLM, rows: Sequence[Sequence[int]], skip: int = 0) -> float:
    """Per-token perplexity of each row, ignoring its first `skip` tokens."""
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids).logits[0, skip:-1].float()
            total += float(functional.cross_entropy(logits, ids[0, skip + 1 :], reduction="sum"))
            count += len(row) - 1 - skip
    return math.exp(total / count) if count else math.nan


def evaluate(path: Path, device: torch.device, samples: int = 400) -> dict[str, float]:
    """Score a saved checkpoint, read in float32, on held-out material; print samples."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(path)
    for text in ("47 + 38 = 85", "naïve ☕ 日本\n\n  x\t1234 <|im_end|>", "a" * 50 + " é\r\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    scores: dict[str, float] = {}

    def score(name: str, prompts: list[str], expected: list[str], limit: int) -> None:
        scores[name], misses = exact(complete(model, tokenizer, prompts, limit), expected)
        print(f"{name}: {scores[name]:.4f} of {len(prompts)}", *misses, sep="\n  ", flush=True)

    pairs = held_out_pairs()
    sums = [f"{a} + {b} = {a + b}" for a, b in pairs]
    score("addition", [f"{a} + {b} =" for a, b in pairs], [f" {a + b}" for a, b in pairs], 6)
    score("addition_chat", [ask(tokenizer, f"What is {a} + {b}?") for a, b in pairs], sums, 16)
    rng = make_rng("held-out copies")
    texts = [copy_items(rng) for _ in range(samples)]
    score("copying", [f"Copy: {text}\n" for text in texts], texts, 120)
    asked = [ask(tokenizer, f"Repeat after me: {text}") for text in texts]
    score("copying_chat", asked, texts, 120)

    rng = make_rng("held-out stories")
    told = [tell_story(rng).text + END for _ in range(samples)]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in told]
    scores["story_perplexity"] = perplexity(model, encoded)
    flat = [token for ids in encoded for token in ids]
    rows = [flat[i : i + CONTEXT] for i in range(0, len(flat) - CONTEXT, CONTEXT)][:20]
    scores["story_perplexity_beyond_1024"] = perplexity(model, rows, skip=1024)
    print(json.dumps(scores))

    prompts = ["Once upon a time", "There once was a robot", "47 + 38 =", "7 + 5 ="]
    prompts += ["Copy: hello world 123\n", "12+30="]
    questions = ["Tell me a story about a fox.", "What is 12 + 30?", "Repeat after me: I like tea.",
                 "hi", "who are you?", "What is the capital of France?",
                 "Tell me a story about a dragon named Ruby."]  # fmt: skip
    prompts += [ask(tokenizer, question) for question in questions]
    for prompt, answer in zip(prompts, complete(model, tokenizer, prompts, 600), strict=True):
        print("-" * 80, f"{prompt}>>>{answer}", sep="\n")
    return scores


GATES = {"addition": 0.99, "addition_chat": 0.99, "copying": 0.95, "copying_chat": 0.95}


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The flags; those that shaped the shipped model have the values it was made with."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=Path("src/reprise/demo_model"))
    parser.add_argument("--device", help="any torch device; by default the accelerator, if any")
    parser.add_argument("--minutes", type=float, default=3.7, help="time limit of the training")
    parser.add_argument("--steps", type=int, default=100_000, help="step limit of the training")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--row", type=int, default=512, help="row length of the first 80 percent")
    parser.add_argument("--last-row", type=int, default=2048, help="row length of the rest")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps until the full rate")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers")
    parser.add_argument("--stream-tokens", type=int, default=90_000_000)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the documents to make"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--samples", type=int, default=400, help="held-out copies and stories")
    parser.add_argument("--only-evaluate", action="store_true", help="score what is in --out")
    parser.add_argument("--show", type=int, default=0, help="print this many stories and stop")
    return parser.parse_args()


def main() -> int:
    """Make the data, train, save and score."""
    args = parse_arguments()
    if args.show:
        rng = make_rng("show")
        for _ in range(args.show):
            print(tell_story(rng).text, "-" * 80, sep="\n")
        return 0
    begin = time.perf_counter()
    if not args.only_evaluate:
        tokenizer = train_tokenizer()
        print(f"tokenizer ready after {time.perf_counter() - begin:.1f} s", flush=True)
        stream = build_stream(tokenizer, args.stream_tokens, args.scale, args.workers)
        print(
            f"{len(stream.lengths)} documents, {len(stream.ids)} tokens"
            f" after {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    import torch
    import transformers

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(args.device) if args.device else default or torch.device("cpu")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    if not args.only_evaluate:
        model = make_model().to(device)
        print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
        config = TrainConfig(
            minutes=args.minutes,
            steps=args.steps,
            batch_tokens=args.batch_tokens,
            row=args.row,
            last_row=args.last_row,
            learning_rate=args.learning_rate,
            warmup=args.warmup,
            compile=args.compile,
        )
        print(json.dumps(train(model, stream, config)), flush=True)
        save(model, tokenizer, args.out)
    torch.set_float32_matmul_precision("highest")
    scores = evaluate(args.out, device, args.samples)
    print(f"done after {time.perf_counter() - begin:.1f} s")
    failed = [name for name, gate in GATES.items() if scores[name] < gate]
    print("below the gate: " + ", ".join(failed) if failed else "every gate is met")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
