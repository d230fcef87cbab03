"""The closed vocabulary of the generated text.

Apart from the grammar that uses it: a small, fixed set of words is what lets a model of two million parameters learn
the tasks.
"""

ITEMS = (
    "ant", "apple", "bag", "ball", "bear", "bed", "bell", "bird", "boat", "book", "box", "bread", "bus", "cake", "car",
    "cat", "chair", "cow", "cup", "dog", "door", "duck", "egg", "fish", "fox", "frog", "goat", "hat", "hen", "house",
    "key", "king", "kite", "lamp", "leaf", "lion", "map", "milk", "moon", "mouse", "nest", "nut", "owl", "pen", "pig",
    "plane", "plate", "queen", "rain", "ring", "road", "rock", "rose", "ship", "shoe", "snow", "spoon", "star", "stone",
    "sun", "table", "tree", "wall", "wolf",
)  # fmt: skip
GIRLS = (
    "Alice", "Anna", "Clara", "Ella", "Emma", "Grace", "Ivy", "Julia", "Kate", "Lily", "Lucy", "Maria", "Mia", "Molly",
    "Nora", "Rosa", "Ruby", "Sara", "Zoe",
)  # fmt: skip
BOYS = (
    "Adam", "Ben", "Bob", "Daniel", "David", "Finn", "Henry", "Hugo", "Jack", "John", "Leo", "Max", "Oscar", "Paul",
    "Peter", "Rex", "Sam", "Tim", "Tom",
)  # fmt: skip
NAMES = GIRLS + BOYS
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")
THINGS = (
    "ball",
    "kite",
    "hat",
    "book",
    "cup",
    "bag",
    "coat",
    "bike",
    "boat",
    "lamp",
    "pen",
    "scarf",
    "chair",
    "drum",
    "box",
)
PLACES = (
    "in the garden", "in the kitchen", "under the table", "behind the door", "on the roof", "by the river",
    "in the barn", "at the market", "in the park", "on the hill", "near the school", "under the tree",
)  # fmt: skip
GOALS = (
    "park",
    "school",
    "market",
    "garden",
    "river",
    "forest",
    "beach",
    "farm",
    "library",
    "station",
    "bakery",
    "zoo",
)
ANIMALS = ("cat", "dog", "fox", "pig", "cow", "duck", "hen", "goat", "mouse", "lion", "frog", "bear", "rabbit", "horse")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("fast", "slow"), ("day", "night"), ("happy", "sad"),
    ("old", "young"), ("open", "closed"), ("wet", "dry"), ("full", "empty"), ("hard", "soft"), ("light", "dark"),
    ("high", "low"), ("rich", "poor"), ("long", "short"), ("near", "far"), ("good", "bad"), ("left", "right"),
    ("loud", "quiet"), ("early", "late"),
)  # fmt: skip
CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("England", "London"),
    ("Japan", "Tokyo"), ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Greece", "Athens"), ("Egypt", "Cairo"),
    ("Portugal", "Lisbon"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Ireland", "Dublin"), ("China", "Beijing"),
    ("Canada", "Ottawa"),
)  # fmt: skip
SOUNDS = (
    ("dog", "woof"), ("cat", "meow"), ("cow", "moo"), ("duck", "quack"), ("pig", "oink"), ("sheep", "baa"),
    ("bee", "buzz"), ("lion", "roar"), ("mouse", "squeak"), ("hen", "cluck"), ("frog", "croak"), ("snake", "hiss"),
)  # fmt: skip
TINTS = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("a banana", "yellow"), ("coal", "black"),
    ("a tomato", "red"), ("the sun", "yellow"), ("milk", "white"), ("a carrot", "orange"), ("a frog", "green"),
)  # fmt: skip
PLURALS = (
    ("cat", "cats"), ("dog", "dogs"), ("box", "boxes"), ("mouse", "mice"), ("child", "children"), ("foot", "feet"),
    ("tooth", "teeth"), ("man", "men"), ("woman", "women"), ("leaf", "leaves"), ("goose", "geese"), ("bus", "buses"),
)  # fmt: skip

# Frequent words that the tasks above do not need: copying them teaches copying of any word, in one token or several.
COMMON = (
    "about", "above", "again", "air", "also", "always", "answer", "arm", "aunt", "away", "baby", "back", "bank", "bath",
    "because", "begin", "better", "between", "body", "bottle", "brother", "button", "camera", "candle", "castle",
    "change", "cheese", "church", "city", "class", "clock", "cloud", "coffee", "corner", "country", "cousin", "dance",
    "daughter", "desk", "dinner", "doctor", "dream", "dress", "drink", "eat", "engine", "evening", "every", "eye",
    "face", "family", "father", "field", "finger", "fire", "floor", "flower", "food", "four", "fruit", "game", "glass",
    "gold", "grandmother", "ground", "group", "hair", "half", "hand", "head", "heart", "hospital", "hour", "hundred",
    "ice", "idea", "iron", "island", "job", "juice", "jump", "kid", "ladder", "lake", "land", "language", "leg",
    "lemon", "line", "listen", "little", "lunch", "machine", "mail", "meat", "mirror", "money", "mother", "mountain",
    "mouth", "neck", "needle", "never", "news", "noise", "nose", "ocean", "office", "oil", "onion", "paper", "parent",
    "people", "pepper", "person", "picture", "pillow", "place", "plant", "police", "potato", "power", "rabbit", "radio",
    "rice", "room", "rope", "salt", "sand", "sandwich", "shirt", "shop", "shoulder", "silver", "sister", "skirt",
    "sleep", "smile", "soap", "sock", "sofa", "son", "song", "spring", "stairs", "street", "sugar", "summer", "teacher",
    "telephone", "think", "thousand", "ticket", "toe", "tomorrow", "tongue", "towel", "town", "toy", "train", "travel",
    "uncle", "valley", "village", "voice", "walk", "watch", "water", "week", "wheel", "wind", "window", "winter",
    "wood", "word", "work", "world", "year", "yesterday", "zebra",
)  # fmt: skip
