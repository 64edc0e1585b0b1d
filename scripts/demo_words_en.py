"""English words of the demo's phrase grammar. Tables only; `demo_prompts` explains the format."""

from __future__ import annotations

# Words that a sentence needs. They name no edit, so they are never held out.
GRAMMAR_WORDS = """
a an the this that my it its is are be was were to of in on at as if so for from with into by and or
but not no do don't does i i'd i'm you we me us all one more less out up off down over only just
like very can could would should will let have has had than there what how some any them they now 's
"""

FRAMES = {
    # do: imperatives, any polite form may be wrapped around them; say: everything else.
    "adj.do": """
make {obj} {adj} | make {obj} {adj} | make {obj} look {adj} | make {obj} look {very} {adj}
| make {obj} appear {adj} | render {obj} {adj} | give {obj} a {adj} {look} | turn {obj} {adj}
| make {obj} {very} {adj} | create a {adj} version of {obj} | try a {adj} {look}
| get {obj} to look {adj} | leave {obj} looking {adj} | show me {obj} {adj} | use a {adj} {look}
| go for a {adj} {look} | switch to a {adj} {look} | {set} {obj} to a {adj} {look}
| apply a {adj} {look} | let {obj} look {adj} | lend {obj} a {adj} {look} | produce a {adj} {pic}
| {turn} {obj} into something {adj} | return a {adj} copy of {obj} | paint {obj} {adj}
""",
    "adj.say": """
{adj} | {adj} | {adj} {look} | {adj} {pic} | {very} {adj} | i want {obj} {adj} | i want {obj} to be
{adj} | {obj} should be {adj} | {obj} should look {adj} | i'd like {obj} to look {adj} | {obj} but
{adj} | a {adj} version of {obj} | a {adj} {look} | i'd like a {adj} {look} | something {adj}
| {obj} needs to be {adj} | i need {obj} {adj} | {obj} has to look {adj} | {adj} version
| how would {obj} look {adj} | i'd prefer {obj} {adj} | can {obj} be {adj} | could {obj} look {adj}
| i wish {obj} was {adj} | {obj} would be nicer {adj} | what about a {adj} {look} | {adj} {look}
wanted
""",
    "cmp.do": """
make {obj} {cmp} | make {obj} {much} {cmp} | make {obj} look {cmp} | make {obj} {much} {cmp}
| make {obj} a {much} {cmp} | get {obj} {cmp} | render {obj} {much} {cmp} | let {obj} be {cmp}
| {set} {obj} {cmp} | make {obj} {cmp} and {cmp} | make {obj} appear {cmp} | turn {obj} {much} {cmp}
""",
    "cmp.say": """
{cmp} | {much} {cmp} | i want {obj} {cmp} | {obj} should be {cmp} | {obj} needs to be {much} {cmp}
| a little {cmp} | i'd like {obj} {much} {cmp} | can {obj} be {cmp} | {cmp} {pic} | could {obj} be
{cmp} | {cmp} and {cmp} | i'd prefer {obj} {cmp} | {obj} would look better {cmp} | {cmp} than now
| {cmp} version of {obj} | it must be {cmp} | i need {obj} to be {cmp}
""",
    "noun.do": """
{turn} {obj} into {noun} | {turn} {obj} to {noun} | {turn} {obj} into {noun} | {turn} to {noun}
| {turn} into {noun} | make {obj} {noun} | switch {obj} to {noun} | render {obj} as {noun}
| show {obj} in {noun} | use {noun} | redo {obj} as {noun} | make {noun} of {obj}
| put {obj} in {noun} | create {noun} from {obj} | {turn} {obj} so it becomes {noun}
| present {obj} as {noun} | set {obj} to {noun} | produce {noun}
""",
    "noun.say": """
{noun} | {noun} | i want {noun} | as {noun} | i'd like {noun} | {obj} in {noun} | {obj} as {noun}
| {noun} version | {noun} {look} | it should be {noun} | {obj} should become {noun}
| {noun} is what i want | i need {noun} | i'd love to see {obj} as {noun} | {obj} to {noun} | to
{noun}
""",
    "fx.do": """
{add} {fx} | {add} {fx} to {obj} | {add} {fx} to {obj} | {add} {fx} over {obj} | give {obj} {fx}
| use {fx} | put {fx} on {obj} | {turn} {obj} with {fx} | edit {obj} with {fx} | {add} {fx} {place}
| cover {obj} with {fx} | bring {fx} into {obj} | try {fx} | go for {fx} | lay {fx} over {obj}
| create {fx} | treat {obj} with {fx} | style {obj} with {fx} | let {obj} have {fx}
""",
    "fx.say": """
{fx} | {fx} | i want {fx} | with {fx} | {obj} with {fx} | {obj} needs {fx} | i'd like {fx}
| {obj} should have {fx} | {fx} on {obj} | there should be {fx} | i need {fx} | {obj} could use {fx}
| {fx} would be nice | can i have {fx} | i'd love {fx} | what about {fx} | {fx} all over
""",
    "verb.do": """
{verb} {obj} | {verb} {obj} | {verb} {obj} | {verb} {obj} | {verb} {obj} {amount} | {verb} {obj}
| {amount} {verb} {obj} | {verb} {det} {pic} | try to {verb} {obj} | {verb} {obj} {amount}
| {verb} {det} {pic} {amount} | go ahead and {verb} {obj} | {verb} every part of {obj}
""",
    "verb.say": """
i want to {verb} {obj} | i'd like to {verb} {obj} | i need to {verb} {obj} | we should {verb} {obj}
| how do i {verb} {obj} | is it possible to {verb} {obj} | it would be good to {verb} {obj}
| i'm trying to {verb} {obj} | want you to {verb} {obj} | time to {verb} {obj} | let me {verb} {obj}
""",
    "like.do": """
make {obj} look like {like} | make {obj} look like {like} | {turn} {obj} into {like}
| make {obj} resemble {like} | make {obj} feel like {like} | render {obj} like {like}
| {turn} {obj} to look like {like} | style {obj} like {like} | edit {obj} to look like {like}
| make {obj} similar to {like} | make it seem like {like} | imitate {like} | mimic {like}
| recreate {obj} in the style of {like} | redo {obj} in the manner of {like} | make {obj} {like}
""",
    "like.say": """
like {like} | {obj} like {like} | in the style of {like} | as {like} | {like} {look} | {like}
| i'd like {obj} to look like {like} | i want it to look like {like} | it should look like {like}
| {obj} as {like} | as if it were {like} | something like {like} | {obj} should resemble {like}
| reminiscent of {like} | inspired by {like} | how would {obj} look as {like}
""",
    "phrase.say": "{phrase}",
    "act.do": "{act}",
}

COMMON = {
    "obj": """
it | it | it | this | {det} {pic} | {det} {pic} | {det} {pic} | {det} {pic} | {det} {whole} {pic}
| everything | the whole thing | all of it | {pic}
""",
    "det": "the | the | this | my | that | our | the uploaded | the attached | the given | the original",
    "pic": """
picture | photo | image | photograph | pic | shot | snapshot | scene | frame | view | snap | still
| picture | photo | image | wallpaper | screenshot | artwork | file | upload | jpeg | composition
| capture | photography | footage | input | visual
""",
    "whole": "whole | entire | complete | full",
    "look": """
look | feel | style | mood | tone | vibe | atmosphere | appearance | effect | finish | aesthetic
| touch | treatment | character | ambience | impression | air | filter | theme | version | feeling
| rendition | variant | design | grading | preset | mode
""",
    "very": """
really | very | extremely | completely | totally | slightly | somewhat | quite | rather | super
| fully | fairly | strongly | pretty | wonderfully | entirely | all | incredibly | moderately
""",
    "much": """
much | a bit | a little | a lot | a tad | slightly | far | way | noticeably | somewhat | even
| considerably | significantly | a touch | visibly | clearly | a good deal | a little bit
""",
    "amount": """
a bit | a little | slightly | a lot | strongly | completely | heavily | gently | quickly | softly
| for me | somewhat | entirely | fully | noticeably | carefully | nicely | properly | at once
| right away | dramatically | subtly | totally | a tad | everywhere
""",
    "turn": """
turn | change | convert | transform | make | switch | edit | alter | modify | adjust | shift | morph
| rework | process | remake | restyle | translate | transfer | reimagine
""",
    "set": "set | get | bring | take | adjust | tune",
    "add": """
add | apply | put | use | add | apply | give | throw on | lay | set | include | bring in | overlay
| introduce | insert | create | drop in | slap on | layer | implement | place
""",
    "place": "everywhere | all over | across the {pic} | over everything | throughout | all around",
}

# {do} is the imperative.
POLITE = """
{do} | {do} | {do} | {do} | {do} | {do} | please {do} | {do} please | can you {do} | could you {do}
| would you {do} | can you please {do} | could you please {do} | i want you to {do} | {do} for me
| i'd like you to {do} | i would like to {do} | let's {do} | just {do} | kindly {do} | pls {do}
| {do} thanks | hey, {do} | {do} if you can | {do} now | now {do} | would you mind to {do}
| {do}, thank you | help me {do} | i need you to {do} | try to {do} | plz {do} | ok {do} | so {do}
| hi, {do} | you should {do} | may i ask you to {do} | go and {do} | simply {do} | do {do}
| quickly {do} | will you {do} | be so kind and {do} | i wish you would {do} | {do}, cheers
"""

JOIN = (
    "{a}, {b} | {a} and {b} | {a}, {b} | {a}. {b} | {a} - {b} | {a}; {b} | {a}, and {b} | {a} + {b}"
)

TINT = {
    "adj": """
{hue} | {hue} | {hue} | all {hue} | {hue} all over | completely {hue} | {hue}-tinted | {hue}-toned |
{hue} tinted | {hue} colored | {hue}-coloured | {hue} tinged
""",
    "noun": "{hue} | {hue} tones | {hue} hues | shades of {hue} | {hue} light | {hue} colours",
    "fx": """
a {hue} {veil} | a {hue} {veil} | a {hue} {veil} | a {hue} {veil} | {hue} light | {hue} tones |
{hue} tinting | a {strong} {hue} {veil} | a {strong} {hue} {veil} | a {veil} of {hue} | more {hue} |
{hue} lighting | some {hue} | {hue} color grading | a {hue} colour {veil}
""",
    "act": """
tint {obj} {hue} | colour {obj} {hue} | tinge {obj} with {hue} | bathe {obj} in {hue} light
| wash {obj} in {hue} | tone {obj} {hue} | flood {obj} with {hue} light | dye {obj} {hue}
| shift the colours to {hue} | shift the hue towards {hue} | drench {obj} in {hue} | soak {obj} in
{hue} | shift the white balance to {hue} | light {obj} in {hue} | dip {obj} in {hue} | stain {obj}
{hue} | push the tones towards {hue} | boost the {hue} channel | increase {hue} | raise the {hue}
level | cover {obj} in a {hue} {veil} | make every colour {hue} | make everything {hue} | turn
everything {hue} | turn all colours {hue} | move the colour balance to {hue} | strengthen the {hue}
tones | make {obj} more {hue} | colourize {obj} in {hue} | saturate {obj} with {hue} | emphasise
{hue}
""",
    "like": """
a {pic} in {hue} light | a {pic} through {hue} glass | a {pic} taken through a {hue} lens
| a {hue} world | a scene under {hue} lamps | a {hue} monochrome
""",
    "phrase": """
everything in {hue} | everything {hue} please | more {hue} please | {hue} all over | i want it all
{hue} | {hue} is the colour i want | as seen through {hue} glasses | {hue} everywhere | all in {hue}
| the world in {hue} | {hue} overtones | a hint of {hue} | let it shine in {hue} | only {hue}
| dominated by {hue} | in {hue} light | with {hue} overlay | {hue} colour scheme | glowing {hue}
""",
    "veil": """
tint | filter | tone | cast | hue | glow | wash | overlay | tinge | shade | colour cast | veil |
light | sheen | tinting | gel | colour filter | toning | shimmer | tint | filter | mask
""",
    "strong": "strong | light | subtle | deep | soft | intense | heavy | gentle | slight | faint | bold",
}

CUES = {
    "identity": {
        "act": """
leave {obj} as it is | leave {obj} alone | leave {obj} unchanged | leave {obj} untouched | keep
{obj} as it is | keep {obj} the same | keep {obj} unchanged | keep {obj} like this | keep {obj}
intact | do nothing | do nothing to {obj} | don't change {obj} | don't change anything | don't touch
{obj} | don't edit {obj} | don't modify {obj} | don't alter {obj} | change nothing | make no changes
| make no change to {obj} | return {obj} unchanged | return {obj} as is | return the original | give
me back the original | preserve {obj} | preserve everything | preserve the original {pic} | keep
everything | keep the original | copy {obj} | reproduce {obj} exactly | output the same {pic} |
return the same {pic} | hold {obj} as it is | avoid any changes | make zero edits | skip the editing
| skip this edit | show the original {pic} | give {obj} back untouched | stay with the original |
retain {obj} | retain the original | don't do anything | make it identical to the original | output
{obj} without changes | leave everything as it was | refrain from editing | abstain from any change
| maintain {obj} as is | duplicate {obj} | let {obj} be | let it stay as it is | let {obj} remain
unchanged | let everything stay the same | keep all details | keep {obj} exactly as it is | do not
change a thing | leave {obj} be | return {obj} without edits | apply nothing | do not apply any
filter | preserve {obj} as it is | keep {obj} identical | make no edits | return the same {pic}
again | just return {obj} | edit nothing | alter nothing | touch nothing | leave {obj} the same |
leave everything unchanged | do no editing | give me the same {pic} | give me the original {pic} |
do not alter {obj} | modify nothing
""",
        "phrase": """
no change | no changes | no edit | no edits | nothing | unchanged | same | as is | identity | none
| original | the original {pic} | same {pic} | identical | no editing | without changes | no
modification | no modifications please | it is fine as it is | {obj} is perfect already | {obj} is
fine | i like it as it is | nothing to change | nothing to do | nothing needs to change | keep |
untouched | no alteration | no edit needed | unmodified | unedited | zero changes | original version
| not a single change | everything should stay the same | {obj} should stay as it is | {obj} should
remain unchanged | i want the same {pic} | an identical copy | exact copy | a plain copy | no effect
| no filter | without any effect | no filter please | no adjustments | nothing at all | unaltered |
{obj} is good already | just the original | intact | as before | as it was | don't | status quo |
noop | stay | same as the input | same as before | i don't want any changes | there is nothing to
edit | already good | happy with it as it is | pass | it should remain the same | preserved | the
unedited {pic} | {obj} needs no editing | null edit | exactly the same {pic} | no need to change
{obj} | no need for edits | unchanged please | same again | the same as before | as the original |
no processing | no editing at all | without edits | without any change | without editing | raw {pic}
| original please | keep it | leave it | just keep it | i want no change | not changed | {obj} is
good as it is | {obj} looks fine already | there is no need to edit it | original {pic} unchanged |
remain as is | stays as it is
""",
    },
    "bw": {
        "adj": """
black and white | black and white | black-and-white | monochrome | monochromatic | greyscale | grey
| colourless | desaturated | achromatic | uncoloured | drained of colour | free of colour | without
colour | noir | b&w | b/w | bw | devoid of colour | fully desaturated | decolourised | silvery grey
| colour-free | grey-toned | black & white | black n white | unsaturated | stripped of colour |
ashen grey | neutral grey | greyish | hueless | monotone | monochromed | black and white only |
decoloured | saturation-free
""",
        "noun": """
black and white | black and white | monochrome | greyscale | b&w | a black and white {pic} | a
greyscale {pic} | shades of grey | grey tones | a monochrome print | a noir {pic} | a silver gelatin
print | black & white | bw | a monochrome {pic} | monochrome mode | greys | grey scale | a grey
{pic} | a colourless {pic} | a b&w {pic}
""",
        "fx": """
a black and white filter | a greyscale filter | a noir effect | a monochrome filter | full
desaturation | zero saturation | a b&w filter | a grey filter | black and white film | a
desaturation effect | a bw filter | monochrome toning | a noir {look} | a greyscale effect | a
black-and-white conversion
""",
        "verb": """
desaturate | decolourise | take the colour out of | remove the colour from | remove all colours from
| drain the colour from | strip the colour from | get rid of the colours in | kill the colour in |
grey out | delete all colour from | discard the colours of | suck the colour out of | drop the
colour from | fully desaturate | remove every colour from | erase the colours of | eliminate colour
from | pull the colour out of | remove the saturation from | take away the colours of | monochrome |
wipe the colours from | drain | monochromise | strip all colour from | strip colour from | take all
colours out of | remove colour in | drain all colour from | decolour
""",
        "act": """
convert {obj} to black and white | set the saturation to zero | turn off the colours | switch off
the colours | drop the saturation to 0 | lose the colours | remove colours | keep only the grey
tones | remove all hues | reduce {obj} to greys | strip {obj} of colour | drain {obj} of colour |
keep only the luminance | make all colours grey | turn all colours to grey | print {obj} in black
and white | rid {obj} of colour
""",
        "like": """
a film noir | an old black and white movie | a charlie chaplin film | a newspaper photo | a silent
film | an ansel adams photograph | classic noir cinema | a greyscale photocopy | a black and white
tv broadcast | a hitchcock movie | a 1940s noir film | monochrome film | a black and white print
""",
        "phrase": """
no colour | no more colour | no colours please | saturation 0 | zero saturation | only grey tones |
only shades of grey | just black and white | no hues at all | colours off | only black, white and
grey | i don't want any colour | the colours should disappear | fifty shades of grey | without any
colours | all grey | too much colour, make it grey | monochrome | noir | greyscale | b&w | bw |
{obj} without its colours | let the colours vanish | no chroma | {obj} in black and white film |
classic black and white photography | i hate the colours, take them away | monotone | monochromatic
| in greyscale | in monochrome | in black and white | colours removed | remove saturation |
desaturated | desaturate | without colours | colour free | no saturation | only luminance | the
{pic} in greyscale | black and white please | decolourised
""",
    },
    "sepia": {
        "adj": """
sepia | sepia | sepia-toned | sepia toned | vintage | vintage | old-fashioned | antique | aged |
retro | nostalgic | old | brownish | brown | yellowed | old-timey | old-time | antiquated | historic
| historical | victorian | ancient | tea-stained | browned | archival | time-worn | weathered |
edwardian | 19th century | 1900s | 1920s | sepia tinted | bygone | old school | olden | rustic brown
| coffee-coloured | sepia-tinted | archaic | heirloom | timeworn | oldish | antiqued | old and brown
| aged and brown | vintage-like | retro-styled | vintage-toned
""",
        "noun": """
sepia | sepia tone | sepia tones | an old photograph | a vintage photo | an antique photo | brown
tones | a sepia {pic} | a retro {pic} | an aged photograph | a historic photo | a vintage print | a
daguerreotype | a tintype | a relic | a sepia print | vintage style | a museum photo | an heirloom
photo
""",
        "fx": """
a sepia filter | a sepia tone | a vintage filter | a vintage effect | a retro filter | sepia toning
| a brown tint | an antique effect | an old photo effect | a sepia wash | brown toning | an aged
{look} | a vintage {look} | a nostalgic touch | a sepia tint | a brownish tint | antique toning | a
patina | old-time charm | an old-film effect | a coffee-brown tone | sepia
""",
        "verb": "sepia tone | age | antique | yellow | brown | sepia-tone | add sepia to | sepiafy | apply sepia to",
        "act": """
make {obj} look old | make {obj} look aged | make {obj} look a hundred years old | give {obj} a
vintage feel | take {obj} back in time | send {obj} back to the 1900s | tint {obj} brown | tone
{obj} brown | make {obj} look ancient | give {obj} an old-fashioned charm | make {obj} vintage |
date {obj} back a century | make {obj} look like grandma's album | give {obj} a patina of age | make
{obj} look nostalgic | make {obj} retro | wash {obj} in brown tones | make {obj} look yellowed with
age
""",
        "like": """
an old photograph | an old photo | a photo from 1900 | a photo from the 19th century | a vintage
postcard | a picture from grandma's album | an antique photograph | a daguerreotype | a wild west
photo | a victorian portrait | a faded brown print | an ancient photograph | a photo from the good
old days | an old family album | a wanted poster | an old western | something from the last century
| an archive photo | a tintype | the 1920s | an early photograph | old parchment | a historical
document | a war-time photo | an old postcard | grandfather's time
""",
        "phrase": """
sepia | sepia tone | vintage | retro | vintage style | the good old days | old times | old photo
style | back in time | a hundred years ago | like in the olden days | brown and nostalgic | vintage
photo effect | retro style | as if taken in 1900 | old and brown | antique style | aged paper look |
yellowed with age | nostalgia | as in my grandmother's album | from the past | wild west style |
turn back the clock | sepia please | old brown tones | as if it was taken 100 years ago | vintage
vibes | days of yore | antique photo | aged | antique | old | old-fashioned | old photo | old
picture | an old brown photo | brown tint | brownish | sepia toned | sepia brown | ancient | old
times photo | oldish | aging
""",
    },
    "invert": {
        "adj": """
inverted | negative | colour-inverted | inverse | reversed in colour | like a negative | solarised
negative | photo-negative | tone-reversed | complementary | opposite in colour | colour-reversed |
colour inverted | negated
""",
        "noun": """
a negative | negative | a film negative | its negative | a photo negative | inverted colours |
inverse colours | a colour negative | complementary colours | opposite colours | the negative {pic}
| negative colours | reversed colours | a negative film | its inverse | the opposite colours | its
opposite
""",
        "fx": """
a negative effect | an invert filter | colour inversion | inversion | an inverted effect | negative
colours | a negative filter | inverted colours | a colour reversal | an inverse effect | reversed
tones | negation | a photo negative effect
""",
        "verb": """
invert | negate | invert the colours of | invert the colours in | reverse the colours of | flip the
colours of | colour-invert | reverse the tones of | inverse | create the negative of | invert the
tones of | invert the brightness of | flip the tones of | reverse all tones in
""",
        "act": """
invert the colours | invert all colours | invert everything | reverse the colours | flip the colours
| flip black and white | turn light into dark and dark into light | make white black and black white
| swap light and dark | replace each colour by its complement | replace each colour with its
opposite | make a negative | exchange light and dark | reverse light and shadow | give me the
negative | swap black and white | make the colours opposite | turn {obj} into its opposite | make
dark bright and bright dark | do a colour inversion | invert the pixels | flip light and dark |
negate the colours | reverse all the tones | invert rgb | switch black with white
""",
        "like": """
a film negative | a photographic negative | an x-ray | an undeveloped film | a negative strip | a
35mm negative | an undeveloped negative | an x-ray image | a radiograph
""",
        "phrase": """
invert | inverted | negative | colour inversion | inverse | inverted colours | opposite colours |
black becomes white | white becomes black | light areas dark and dark areas light | colours inverted
| negative image | film negative | every colour the opposite | reversed colours | complement of
every colour | photo negative | x-ray style | black to white and white to black | negative mode |
all colours flipped to the opposite | reversed tones | inversion | colours reversed | colour
negative | negative colours | reverse colours | invert colours | opposite colour | inverse colours |
negatives | reversed | inverted tones | invert please
""",
    },
    "bright": {
        "adj": """
bright | bright | luminous | well-lit | well lit | light | sunlit | shining | radiant | brilliant |
sunny | glowing | lit up | brightly lit | high-key | illuminated | luminescent | gleaming |
overexposed | full of light | light-filled | dazzling | airy | bright and airy | lightened |
brightened | beaming | daylit | light-flooded | blazing | clear and bright | lightsome | high in
brightness | sunshiny | brightness-boosted | well illuminated | sun-filled | lighted | enlightened
""",
        "cmp": """
brighter | lighter | brighter | more luminous | less dark | not so dark | better lit | more
illuminated | more radiant | more exposed | sunnier | not as dark | less dim | less gloomy | less
murky | more brightly lit | more brilliant | shinier | airier | less shadowy | less underexposed
""",
        "noun": "broad daylight | a bright {pic} | bright daylight | a well-lit {pic} | high key | full daylight",
        "fx": """
more light | light | brightness | more brightness | extra light | more exposure | sunlight | some
light | higher exposure | a brightness boost | bright lighting | better lighting | daylight | more
illumination | strong light | a higher brightness | a bright light | a lot of light | additional
lighting | luminosity | more shine | a fill light | lots of sunshine
""",
        "verb": """
brighten | brighten up | lighten | lighten up | light up | illuminate | overexpose | increase the
brightness of | raise the brightness of | boost the brightness of | increase the exposure of | raise
the exposure of | turn up the brightness of | push the exposure of | lift the shadows of | expose |
shed light on | shine a light on | shine more light on | cast more light on | enlighten | enhance
the brightness of | improve the lighting of | lift | amplify the brightness of | elevate the
brightness of | make bright | raise the light of | increase the light in | boost the light in |
bring light into | pour light on | turn up the light in | give light to
""",
        "act": """
increase the brightness | raise the brightness | boost the brightness | turn up the brightness |
raise the exposure | increase the exposure | turn on the light | turn on the lights | switch on the
lights | let there be light | let the light in | crank up the brightness | lift the shadows | open
up the shadows | turn the lights up | bring {obj} out of the dark | fix the dark {pic} | pump up the
brightness | up the brightness | make it shine | improve the lighting | fill {obj} with light |
flood {obj} with light | add more light | bring up the light | fix the underexposure | correct the
underexposure | bring some light in | let the sun shine in
""",
        "phrase": """
too dark | it is too dark | {obj} is too dark | i can't see anything, it's so dark | it is
underexposed | brightness up | exposure up | more light please | lights on | brightness +50 | plus
one stop | it needs light | let there be light | i can hardly see anything | it's a bit dark,
brighten it | as bright as day | higher brightness | overexposed | bright please | exposure +1 |
brighter exposure | there is not enough light | it looks too gloomy | underexposed, fix it | not
bright enough | open the curtains | bathed in sunlight | give it some light | brightness |
brightening | brightness boost | more brightness | brighter please | brightened | light up | raise
brightness | increase brightness | boost brightness | turn up the light | higher exposure | not as
dark | too dim | it is too dim | it is too gloomy | lit up | a lighter {pic}
""",
    },
    "dark": {
        "adj": """
dark | dark | dim | gloomy | shadowy | murky | underexposed | low-key | sombre | dusky | unlit |
dimly lit | moody dark | poorly lit | shaded | darkened | dimmed | low-light | tenebrous | badly lit
| barely lit | dark and moody | bleak and dark | grim | black as coal | shadowed | sinister | dingy
| deep dark | overcast and dark | darkish | in shadow | murky and dark | dark-toned | low in
brightness | dimmed down | shadow-filled | unilluminated
""",
        "cmp": """
darker | dimmer | darker | less bright | not so bright | gloomier | murkier | more shadowy | less
luminous | less exposed | not as bright | more underexposed | duskier | less lit | less light |
moodier and darker | more sombre | deeper and darker | more dim | grimmer | less overexposed
""",
        "noun": "darkness | shadow | a dark {pic} | low key | gloom | low light | a low-key {pic} | dim light | the dark | shade",
        "fx": """
darkness | shadow | less light | less brightness | dim lighting | low light | shadows | a dark
filter | gloom | less exposure | lower exposure | a dark shade | dark lighting | deep shadows | a
lower brightness | low-key lighting | weak light | a dimming effect | darker tones | more shadow | a
shadowy veil | a gloomy {look}
""",
        "verb": """
darken | dim | darken | shade | underexpose | turn down the brightness of | lower the brightness of
| tone down the light of | reduce the brightness of | decrease the brightness of | lower the
exposure of | reduce the exposure of | black out | pull down the exposure of | turn down the light
in | cut the brightness of | deepen the shadows of | drop the brightness of | bring down the
brightness of | lessen the light in | diminish the light of | dial down the brightness of | shadow |
weaken the light of | obscure | overshadow | make dark | lower the light of | decrease the light in
| turn down the light of | take light out of | reduce the light in | remove light from | bring
darkness to | dim down
""",
        "act": """
lower the brightness | reduce the brightness | decrease the brightness | turn down the brightness |
reduce the exposure | lower the exposure | dim the light | dim the lights | turn down the light |
turn the light down | turn off the light | turn off the lights | switch off the light | drop the
exposure | draw the curtains | deepen the shadows | take some light away | remove some light | cut
the light | decrease the exposure | bring the brightness down | drown {obj} in shadow | cover {obj}
in darkness | plunge {obj} into darkness | wrap {obj} in shadow | sink it in gloom | fix the
overexposure | put {obj} in the shade | cast a shadow over {obj} | correct the overexposure
""",
        "phrase": """
too bright | it is too bright | {obj} is too bright | it's overexposed | brightness down | exposure
down | lights out | less light please | brightness -50 | minus one stop | lower brightness | it
blinds me | the light is too strong | it's so bright it hurts | as dark as possible | dark please |
darkness falls | dark mode | exposure -1 | close the blinds | it should lie in shadow | overexposed,
fix it | not so much light | dark and gloomy | in the shadows | too much light | it looks too
bright, darken it | barely any light | dimming | dimmed | darkened | darkening | darker please | in
the dark | reduce brightness | lower the light | decrease brightness | too light | too luminous |
shadows | in shadow | gloomy | underexposure | less exposure | reduced brightness | not as bright |
a darker {pic} | turn down the light | murky | too sunny
""",
    },
    "night": {
        "adj": """
nocturnal | night-time | nighttime | moonlit | night | starlit | midnight | night-like | nightly |
moonlit | late-night | night-dark | moon-lit | after-dark | moonlight blue | day-for-night |
benighted
""",
        "noun": """
night | a night scene | a night scene | nighttime | night time | a nocturnal scene | midnight | a
moonlit scene | a night shot | a night view | a moonlit night | a nightscape | a night photo | the
middle of the night | late night | moonlight | a night version | night mode | a starlit night | a
dark night | nightfall | the dead of night | evening darkness | a nocturne | the night | a scene at
night | a late-night scene
""",
        "fx": """
moonlight | night lighting | a night effect | a night filter | a nocturnal mood | a night atmosphere
| nighttime lighting | a moonlit glow | starlight | a night sky mood | a day for night effect | a
nightly mood | night | midnight blue light | a midnight {look} | moon light | a nocturnal ambience |
night vibes
""",
        "act": """
change to night scene | change to a night scene | change the time to night | change the time of day
to night | make it night | change day to night | turn day into night | turn daytime into nighttime |
let night fall | let the night fall | make the sun go down completely | set the time to midnight |
bring on the night | switch to night | make it midnight | make it look like night | make it
nighttime | relight {obj} for night | bathe {obj} in moonlight | simulate night | light {obj} with
moonlight | set {obj} at night | place {obj} in the night | move {obj} to the night | set the clock
to midnight | put {obj} under the moon | do a day for night conversion | make {obj} take place at
night | shoot it at night | make the night come
""",
        "like": """
night | nighttime | a night scene | it was taken at night | it is midnight | a moonlit night | a
photo taken at night | the middle of the night | it's night | night outside | a scene after dark |
late at night | a night in the city | after sunset in the dark | a night shot | it is 2 am | a
starry night | the night has come
""",
        "phrase": """
at night | by night | night | night scene | change to night scene | night time | in the night | in
the middle of the night | after dark | under the moon | under the stars | in the moonlight | night
falls | it is night | midnight | moonlit | what would it look like at night | how does it look at
night | day to night | late at night | night view | nocturnal | taken at night | shot at night |
bedtime | good night mood | by moonlight | when everybody sleeps | at midnight | time of day: night
| night version | once the sun is gone | in the dead of night | night please | a dark blue night
""",
    },
    "warm": {
        "adj": """
warm | warm | sunset-like | golden | sunset-lit | orange | amber | sun-kissed | warm-toned |
sunset-coloured | toasty | cozy | cosy | honey-coloured | golden-hour | glowing orange | peachy |
sunlit gold | fiery orange | orange-gold | summery warm | gilded | fire-lit | candlelit | candle-lit
| tropical | sun-drenched | warmly lit | apricot | evening-gold | sunset-toned | warm-coloured |
evening-like | sunsetty | orange-toned | golden-toned | sunny warm | dusk-like | dawn-like | warmish
| heated
""",
        "cmp": """
warmer | more golden | more orange | cozier | less cold | not so cold | less cool | toastier | more
amber | warmer in tone | more sun-kissed | cosier | more sunset-like | less bluish | warmer in
colour | less chilly
""",
        "noun": """
sunset | a sunset scene | golden hour | a sunset | warm tones | a golden hour shot | warm colours |
an evening scene | dusk light | the golden hour | evening light | sundown | a warm {pic} | sunrise |
dawn | a sunrise scene | warm light | late afternoon | warm hues | an orange sunset | a beach sunset
mood | candlelight | golden light | twilight glow | a warm palette
""",
        "fx": """
warmth | warm light | a sunset glow | warm tones | a warm filter | golden light | a golden glow | an
orange glow | a warm tint | evening sun | sunset light | more warmth | a warming filter | sunset
colours | golden hour light | an orange tint | candlelight | a warm glow | a warm colour temperature
| a sunset filter | an amber tint | fireplace light | a cozy glow | a golden tint | a sunset
atmosphere | a sunset | an evening glow | firelight | golden rays | a setting sun mood | a higher
colour temperature
""",
        "verb": """
warm | warm up | heat up | gild | raise the colour temperature of | increase the colour temperature
of | increase the warmth of | add warmth to | boost the warmth of | warm the colours of | warm the
tones of | make golden | bring warmth to | turn up the warmth of
""",
        "act": """
change to sunset | change the time to sunset | make it sunset | let the sun set | make the sun set |
warm the colours | warm up the colours | warm up the tones | bathe {obj} in golden light | bathe
{obj} in sunset light | raise the temperature | set the white balance warmer | shift the white
balance to warm | shift the colours to orange | increase the temperature | make it look like golden
hour | dip {obj} in gold | light {obj} with the evening sun | raise the colour temperature | turn it
into a golden evening | make it feel like a warm evening | change the time of day to evening | put
it at sunset | light {obj} by candle | bring back the warmth | make it glow like a fire
""",
        "like": """
sunset | a sunset | golden hour | it was taken at sunset | a warm evening | the sun is setting | a
summer evening | a photo taken at golden hour | evening sun | a fireplace glow | sunrise | dusk at
the beach | the last light of the day | a late afternoon in summer | a candlelit room | it is lit by
a fire | a hot desert evening | dawn
""",
        "phrase": """
sunset | at sunset | golden hour | warm | warm tones | in the evening sun | warm colours | sunset
mood | in warm light | it feels too cold | too cold, warm it up | {obj} looks too cold | {obj} is
too blue | at dusk | in the golden hour | sunset vibes | evening light | by candlelight | at dawn |
warm light please | as the sun goes down | temperature up | more warmth please | golden and warm |
cozy evening mood | the sun is setting | kissed by the sun | romantic sunset | white balance warmer
| summer evening | higher temperature | colour temperature up | like a glowing fireplace | warmer
please | warm light | warm glow | golden light | orange glow | warming | it looks so cold, warm it
up | evening sun | sun going down | sunset colours | the sun sets | golden evening | warm orange |
orange light | warmed up | sunrise | less cold | less blue, more orange | warm feeling | an evening
at sunset | warm temperature
""",
    },
    "cool": {
        "adj": """
cool | cool | cold | wintry | winter-like | icy | frosty | chilly | frozen | cool-toned | cold-toned
| glacial | arctic | polar | bluish cold | freezing | snowy | wintery | cold and bluish | ice-cold |
frigid | chilled | nordic | siberian | crisp and cold | hibernal | subzero | frosted | frostbitten |
cold as ice
""",
        "cmp": """
cooler | colder | more wintry | icier | chillier | frostier | less warm | not so warm | more icy |
cooler in tone | snowier | colder in colour | more frosty | less orange | less hot | less yellow |
more arctic | less golden
""",
        "noun": """
winter | a winter scene | a cold winter day | cool tones | cold colours | a winter landscape | a
frosty morning | cold light | wintertime | a snowy day | an icy scene | the ice age | a cold {pic} |
a cool {pic} | cool colours | a frozen world | winter time | a cool palette | icy tones | a cold
palette | a frozen landscape | an arctic scene | january | december | the winter season | deep frost
""",
        "fx": """
coldness | cool light | cool tones | a cooling filter | a cold filter | cold light | frost | an icy
tint | a cool tint | a winter {look} | a winter effect | an icy glow | a cold tone | a chill | a
frosty {look} | winter light | a cool filter | a winter filter | icy tones | a lower colour
temperature | a cold cast | a frosty veil | an arctic chill | wintry light | a wintry atmosphere | a
polar tint | a freezing effect | cold air
""",
        "verb": """
cool | cool down | chill | freeze | lower the colour temperature of | reduce the colour temperature
of | cool the colours of | reduce the warmth of | cool off | decrease the warmth of | cool the tones
of | decrease the colour temperature of | ice | frost | bring winter to | take the warmth out of |
remove the warmth from
""",
        "act": """
change to winter | change the season to winter | make it winter | make it look like winter | cool
the colours | cool down the tones | set the white balance cooler | lower the temperature | drop the
temperature | cool the colours down | turn summer into winter | change summer to winter | make it
feel cold | make it feel like winter | make it look freezing | shift the white balance to cold | let
winter come | bring on the winter | set the season to winter | move {obj} to the arctic | make {obj}
feel chilly | make everything freeze | cover {obj} with frost | switch the season to winter |
decrease the warmth | make it feel icy | reduce the warmth | lower the colour temperature
""",
        "like": """
winter | a winter day | it was taken in winter | a frosty morning | the north pole | the arctic | an
ice age | a cold day | antarctica | an icy morning | siberia | it's freezing | a frozen lake | a
snowy morning | a freezer | a winter morning in norway | a cold day in january | inside a fridge |
christmas time | the ice age
""",
        "phrase": """
winter | in winter | cool tones | cold | cold tones | winter mood | in cold light | it feels too
warm | too warm, cool it down | {obj} looks too warm | {obj} is too yellow | {obj} is too orange |
winter is coming | ice cold | freezing cold | frosty | winter style | season: winter | brrr, make it
cold | temperature down | winter wonderland | snowy winter | frozen | cooler white balance | in the
cold season | cold and frosty | colour temperature down | a chill in the air | icy and cold | winter
please | lower temperature | as cold as ice | the middle of winter | on a cold morning
""",
    },
    "contrast": {
        "adj": """
contrasty | high-contrast | high contrast | punchy | crisp | full of contrast | hard-contrast |
strongly contrasted | rich in contrast | dramatic | stark | bold in contrast | harsh | striking |
tonally strong | hard | contrast-rich | contrasted | sharply contrasted
| highly contrasted | contrast-boosted | strong in contrast | contrast-heavy | high in contrast |
well contrasted
""",
        "cmp": """
more contrasty | punchier | crisper | harsher | more dramatic | less flat | not so flat | starker |
more contrasted | more striking | higher in contrast | stronger in contrast | less hazy and flat |
clearer | more defined | more three-dimensional | harder
""",
        "noun": """
high contrast | a high contrast {pic} | strong contrast | a contrasty {pic} | maximum contrast |
hard contrast | a dramatic high contrast {pic}
""",
        "fx": """
contrast | more contrast | some contrast | punch | more punch | higher contrast | strong contrast |
a contrast boost | a bit of contrast | extra contrast | a lot of contrast | an s-curve | hard
contrast | deeper blacks | tonal depth | more depth | stronger contrast | a stronger black | a tonal
boost | a contrast enhancement | dramatic contrast | more definition | better contrast | clarity |
stark contrasts | deep blacks and bright whites
""",
        "verb": """
increase the contrast of | raise the contrast of | boost the contrast of | enhance the contrast of |
strengthen the contrast of | turn up the contrast of | intensify the contrast of | improve the
contrast of | heighten the contrast of | contrast | push the contrast of | bring out the contrast in
| crank up the contrast of | add contrast to | amplify the contrast of | expand the tonal range of |
increase the contrast in | stretch the histogram of | deepen the contrast of
""",
        "act": """
increase the contrast | raise the contrast | boost the contrast | enhance the contrast | turn up the
contrast | up the contrast | strengthen the contrast | maximise the contrast | improve the contrast
| intensify the contrast | crank up the contrast | make darks darker and lights lighter | make the
blacks blacker and the whites whiter | deepen the blacks and lift the whites | apply an s-curve |
stretch the tonal range | stretch the histogram | pull apart light and dark | widen the tonal range
| separate lights and darks | make {obj} less flat | make the shadows deeper and the highlights
brighter | increase contrast | emphasise light and shadow | make light and shadow more distinct |
bring out the contrast | push the contrast | sharpen the contrast | expand the dynamic range
""",
        "phrase": """
too flat | it looks flat | {obj} looks too flat | {obj} lacks contrast | contrast up | more contrast
please | high contrast | contrast +50 | contrast boost | there is not enough contrast | it lacks
punch | hard light and shadow | higher contrast | strong contrast | stronger contrast | dark darks
and bright brights | contrast | needs more punch | contrast is too low | low contrast, fix it |
dramatic light and shadow | contrast enhancement | bold shadows and highlights | increase contrast |
hdr contrast | maximum contrast | {obj} is dull and flat, add contrast | contrasty | contrasted |
high-contrast | contrast more | with contrast | stronger blacks and whites | lacking contrast |
boost contrast | raise contrast | enhance contrast | more contrasty | not enough contrast | contrast
please | improve contrast | strengthen contrast | light and dark more apart | blacks and whites
""",
    },
    # "enhance quality" is here: of all the demo's edits richer colours are what most users mean by a better picture.
    "vivid": {
        "adj": """
vivid | vivid | vibrant | colourful | saturated | rich in colour | richly coloured | lively |
intense in colour | brightly coloured | lush | highly saturated | oversaturated | full of colour |
colour-rich | eye-popping | bold in colour | flamboyant | gaudy | brilliantly coloured |
candy-coloured | super saturated | luscious | fresh and colourful | hypersaturated | multicoloured
and vivid | popping | deeply coloured | more colourful | vividly coloured | boldly coloured |
strongly coloured | saturation-boosted | colour-intense | enhanced | color-boosted | beautiful
""",
        "cmp": """
more vivid | more vibrant | more colourful | more saturated | richer in colour | livelier | less
dull | less pale | less grey | bolder in colour | more lively | more intense | richer | more lush |
juicier | less colourless | not so dull | better | nicer | fresher | stronger in colour | less drab
| less lifeless | less washed out | less faded | less muted
""",
        "noun": """
vivid colours | vibrant colours | rich colours | strong colours | a colourful {pic} | bold colours |
a vivid {pic} | intense colours | saturated colours | technicolor | full colour | popping colours |
brilliant colours | lively colours | a vibrant {pic} | colour explosion
""",
        "fx": """
more saturation | more colour | vivid colours | vibrant colours | saturation | vibrance | a
saturation boost | richer colours | colour | stronger colours | intense colours | more vibrance | a
colour boost | lively colours | colour intensity | more vibrancy | colour pop | bolder colours |
brilliant colours | better colours | a vivid filter | a pop of colour | life | more life | fresh
colours | deeper colours | higher saturation | better quality | juicy colours | colour richness
""",
        "verb": """
saturate | enrich | enhance | improve | beautify | increase the saturation of | boost the saturation
of | raise the saturation of | intensify the colours of | boost the colours of | enhance the colours
of | enliven | vivify | increase the vibrance of | liven up | perk up | bring out the colours of |
turn up the saturation of | strengthen the colours of | enhance the quality of | improve the quality
of | pump up the colours of | spice up | refresh the colours of | oversaturate | amplify the colours
of | freshen up | juice up | jazz up | revive the colours of | enrich the colours of | deepen the
colours of | polish | optimise | colour-boost | raise the vibrance of | increase the vibrancy of |
increase the colour of | boost the vibrance of | give more colour to | bring colour to | make more
vivid | increase the quality of | upgrade the quality of | enhance the look of
""",
        "act": """
increase the saturation | boost the saturation | raise the saturation | boost the colours |
intensify the colours | enhance the colours | make the colours pop | make the colours richer | make
the colours more intense | make the colours stronger | make the colours vivid | turn up the colours
| turn up the saturation | enhance quality | enhance the quality | improve the quality | improve
quality | make the colours more vibrant | bring the colours to life | let the colours shine | bring
out the colours | make {obj} pop | crank up the saturation | make the colours more lively | make the
colours bolder | increase the vibrance | strengthen the colours | make all colours glow | bring
{obj} to life | breathe life into {obj} | make {obj} look better | make {obj} look great | make
{obj} nicer | make {obj} more beautiful | make the colours brilliant | make the colours fresher |
increase the quality | auto enhance {obj}
""",
        "like": """
a postcard with vivid colours | a candy store | a tropical postcard | a technicolor film | a colour
explosion | a glossy magazine | an advertisement | a travel brochure | a calendar photo | a parrot's
plumage | a colourful carnival
""",
        "phrase": """
too dull | the colours are dull | the colours look pale | {obj} looks dull | richer colours | more
colour | more saturation please | vivid colours | saturation up | colour boost | more vivid |
vibrant | enhance quality | quality enhancement | better quality | high quality | saturation +50 |
it lacks colour | colours that pop | the colours are too weak | eye-popping colours | enhance |
enhanced colours | stronger colours please | saturated colours | higher saturation | full of life
and colour | a feast of colours | more vibrance | the colours should be stronger | improved | {obj}
looks so lifeless | {obj} looks drab | a burst of colour | quality up | lively colours | vividness |
colourful | saturated | saturation | vibrancy | vibrance up | richer | rich colours | intense
colours | colour intensity up | colours up | more colourful | more vibrant | colourfulness | fresh
colours | bright colours | brilliant colours | glowing colours | enhance it | enhancement | quality
enhancement please | increase quality | improved quality | image enhancement | make colours richer |
colour enhancement | boost colours | bold colours | {obj} needs colour | too pale | too grey |
colours too grey | too faded
""",
    },
    "faded": {
        "adj": """
faded | faded | washed-out | washed out | pale | low-contrast | low contrast | matte | muted |
bleached | dull | flat | desaturated a bit | weak in colour | subdued | pastel | milky | pale and
soft | soft in contrast | dusty | sun-bleached | lacklustre | watery | toned-down | anaemic |
bleached out | wan | sun-faded | pallid | dulled | drab | lifeless | soft-toned | wishy-washy |
chalky | light-bleached | palish | fading | weakly coloured | less saturated | light pastel |
pastel-toned | faded out | weak | colour-weak | softly coloured | low-saturation | undersaturated |
sun-washed
""",
        "cmp": """
paler | more faded | flatter | duller | less saturated | less contrasty | less vivid | less
colourful | more washed out | more muted | softer in tone | more matte | less intense | not so
colourful | not so saturated | less punchy | less vibrant | weaker in colour | more pastel | milkier
| more subdued | less gaudy | less lively | drabber
""",
        "noun": """
pastel colours | faded colours | muted colours | pale colours | a faded {pic} | a matte {pic} | low
contrast | washed-out colours | soft pastels | dull colours | muted tones | subdued colours | a
washed-out print | pale tones | a bleached print
""",
        "fx": """
a faded {look} | a matte effect | a fade effect | a faded filter | less contrast | less saturation |
a matte filter | a washed-out effect | muted colours | pale colours | lower contrast | lower
saturation | pastel tones | a fading effect | lifted blacks | a bleached {look} | a pastel filter |
a milky veil of paleness | reduced contrast | weaker colours | subdued colours | a soft matte finish
| softer contrast
""",
        "verb": """
fade | wash out | bleach | mute | dull | flatten | fade out | tone down | reduce the contrast of |
lower the contrast of | decrease the contrast of | lower the saturation of | reduce the saturation
of | decrease the saturation of | mute the colours of | weaken the colours of | fade the colours of
| tone down the colours of | dull the colours of | soften the contrast of | bleach out | pale |
subdue the colours of | weaken the contrast of | lessen the contrast of | wash the colours out of |
partly desaturate
""",
        "act": """
reduce the contrast | lower the contrast | decrease the contrast | fade the colours | lower the
saturation | reduce the saturation | mute the colours | wash out the colours | tone down the colours
| make the colours paler | make the colours weaker | lift the blacks | make the colours dull |
soften the colours | bleach the colours | weaken the colours | let the colours fade | decrease the
saturation | make it look like it lay in the sun for years | take some colour out | make the colours
softer | turn down the saturation | calm the colours | turn down the contrast | raise the blacks and
lower the whites | subdue the colours | make the colours less intense | dull the colours | leave
{obj} in the sun for years | flatten the tones | drop the contrast
""",
        "like": """
a sun-bleached poster | a faded polaroid | a faded photograph | an old polaroid left in the sun | a
washed-out print | a faded poster | a bleached postcard | faded jeans | a worn-out print | a matte
print | a pale watercolour memory | an expired film
""",
        "phrase": """
too colourful | the colours are too strong | it is too saturated | {obj} is too vivid | contrast
down | less contrast please | saturation down | faded | washed out | low contrast | faded colours |
pale | matte look | muted tones | pastel | contrast -50 | faded film | bleached by the sun | the
contrast is too high | {obj} is too contrasty | lower saturation | too gaudy | less colour | soft
muted colours | lower contrast | film fade | too intense, tone it down | weak colours | pale and
dusty | as if left in the sun | dull and lifeless | subdued | fading | fade | faded out | muted |
muted colours | pale colours | desaturated a little | bleached | matte | less saturated | less
saturation | less contrast | reduce contrast | lower contrast please | too vivid | too saturated |
too contrasty | too much contrast | too much saturation | paleness | softer colours | weaker colours
| pastels | dull colours | light pastel tones | washed-out colours
""",
    },
    "fog": {
        "adj": """
foggy | foggy | misty | hazy | smoky | steamy | covered in fog | wrapped in mist | fogbound |
shrouded in mist | vaporous | cloudy and foggy | nebulous | covered in haze | full of fog | smoggy |
fog-covered | enveloped in fog | mist-covered | blanketed in fog | brumous | befogged | fogged |
hidden in mist | veiled in haze | fog-shrouded | smokey | misted | fog-filled | misty-white |
haze-covered | mist-shrouded | vapour-filled | steamed up
""",
        "cmp": """
foggier | mistier | hazier | more foggy | more misty | smokier | more hazy | steamier | less clear,
more misty | smoggier | less visible in the mist
""",
        "noun": """
fog | a foggy scene | mist | a misty morning | haze | a foggy day | a hazy scene | thick fog | a sea
of fog | a foggy {pic} | a misty {pic} | smog | a misty landscape | a foggy morning | pea soup | a
hazy day | a cloud of fog
""",
        "fx": """
fog | mist | haze | a fog effect | thick fog | a misty veil | smoke | some fog | some mist | dense
fog | a foggy atmosphere | a layer of fog | a veil of mist | morning mist | heavy fog | a white haze
| fog everywhere | a hazy effect | a blanket of fog | vapour | steam | a bit of haze | light fog | a
mist effect | swirling fog | smog | ground fog | a thin mist | a hazy veil | clouds of mist | a fog
layer | sea mist | san francisco fog | a white veil
""",
        "verb": """
fog | fog up | mist | haze | envelop in fog | shroud | cloud | mist over | befog | add fog to | add
mist to | add haze to | mist up | becloud | smoke up | steam up
""",
        "act": """
cover {obj} in fog | wrap {obj} in mist | shroud {obj} in fog | hide {obj} in mist | fill {obj} with
fog | let fog roll in | make fog roll in | put {obj} behind a haze | make it look foggy | veil {obj}
in mist | bury {obj} in fog | envelop {obj} in fog | let it disappear in the fog | make the air
misty | add a thick layer of fog | fill the air with mist | make the weather foggy | change the
weather to fog | make everything vanish in mist | make the air hazy | bathe {obj} in mist | change
the weather to foggy | surround it with fog
""",
        "like": """
a foggy morning | a misty morning | a foggy day in london | a misty forest | a day with thick fog |
the scottish highlands in mist | it was shot through fog | a smoky room | it is foggy | a steam bath
| a hazy morning | silent hill | a sauna
""",
        "phrase": """
fog | in the fog | misty | foggy day | foggy weather | lost in the mist | thick fog | hazy | in the
mist | fog rolls in | mist everywhere | misty morning mood | fog effect | london fog | behind a veil
of mist | everything in fog | the fog is coming | weather: fog | haze | low visibility | visibility
near zero | a wall of fog | through the haze | early morning mist | fog please | mist and haze |
nothing but mist | as if seen through steam | smoky | dreamy mist | fogginess | mist | misty | smog
| smokey air | foggy and misty | fogged | misted | haze everywhere | hazy air | with fog | in fog |
in mist | under fog | lots of fog
""",
    },
    "red": {
        "hue": """
red | red | red | red | reddish | crimson | scarlet | ruby | cherry red | blood-red | dark red |
bright red | ruby red | deep red | vermilion | carmine | blood red | brick red | tomato red | ruddy
| fire red | wine red | rose red | cardinal | garnet | maroon | burgundy
""",
        "verb": "redden | tint red | incarnadine | colour red",
        "phrase": "darkroom light | like in a photo lab | red light | the red planet | seeing red | mars colours | red alert | darkroom red",
        "like": "a scene in a darkroom | mars | the red planet | a red-light room",
    },
    "green": {
        "hue": """
green | green | green | green | greenish | emerald | lime | olive | jade | mint | moss green | grass
green | bright green | dark green | forest green | emerald green | lime green | neon green | leaf
green | sea green | pea green | apple green | verdant | viridian | bottle green | chartreuse | mossy
""",
        "verb": "green | tint green | colour green",
        "phrase": "matrix style | like in the matrix | green matrix look | night vision goggles | night vision | matrix green | kermit colours",
        "like": "the matrix | night vision | a matrix scene | an emerald city | a night vision camera",
    },
    "blue": {
        "hue": """
blue | blue | blue | blue | bluish | azure | navy | cobalt | sapphire | indigo | sky blue | deep
blue | bright blue | dark blue | light blue | royal blue | navy blue | ultramarine | cerulean |
electric blue | ocean blue | baby blue | cornflower blue | steel blue | lapis | denim blue
""",
        "verb": "tint blue | colour blue | blue",
        "phrase": "under water | underwater colours | smurf colours | deep sea colours | ocean colours | feeling blue | aquarium light | submerged",
        "like": "an underwater scene | the deep sea | an aquarium | the blue lagoon",
    },
    "pink": {
        "hue": """
pink | pink | pink | pink | pinkish | rose | rosy | magenta | fuchsia | hot pink | pale pink |
bubblegum pink | candy pink | salmon pink | barbie pink | rose pink | baby pink | blush pink |
flamingo pink | neon pink | pastel pink | cherry blossom pink | coral pink | light pink | bright
pink | shocking pink
""",
        "verb": "pinken | tint pink | pinkify | colour pink",
        "phrase": "barbie style | barbie world | through rose-tinted glasses | rose-coloured glasses | think pink | cotton candy colours | bubblegum world",
        "like": "barbie's world | a barbie movie | bubblegum | cotton candy | a flamingo",
    },
    "purple": {
        "hue": """
purple | purple | purple | purple | purplish | violet | lavender | lilac | mauve | plum | amethyst |
deep purple | dark purple | bright purple | grape | royal purple | ultraviolet | violet-coloured |
eggplant | aubergine | orchid | light purple | mulberry | heather | periwinkle-violet | byzantium
""",
        "verb": "purple | tint purple | tint violet | colour purple",
        "phrase": "purple rain | purple haze colours | lavender dreams | purple world | lilac dream | grape juice colours | ultraviolet",
        "like": "a lavender field | purple rain | an amethyst | a violet dream",
    },
    "swap": {
        "noun": "bgr | swapped red and blue | bgr colours | bgr order | exchanged colour channels | swapped channels",
        "fx": """
a channel swap | a red-blue swap | a bgr conversion | swapped channels | a red and blue exchange | a
channel mix-up | bgr order | a permutation of the channels | a colour channel swap | swapped colours
| false colours by channel swap
""",
        "verb": """
swap the channels of | swap red and blue in | exchange red and blue in | swap the colours of | swap
the red and blue channels of | switch red and blue in | channel-swap | shuffle the channels of |
permute the channels of | interchange red and blue in | trade red and blue in | mix up red and blue
in
""",
        "act": """
swap red and blue | swap red with blue | swap blue and red | exchange red and blue | exchange red
for blue | switch red and blue | switch the red and blue channels | swap the red and blue channels |
interchange red and blue | swap the channels | swap the colours | trade red for blue | replace red
by blue and blue by red | make red blue and blue red | turn red into blue and blue into red | swap
the rgb channels | convert rgb to bgr | change rgb to bgr | reverse the channel order | swap r and b
| exchange the colour channels | exchange the r and b channels | flip the red and blue channels |
let red and blue trade places | permute the colour channels | let red and blue change places | turn
reds to blues and blues to reds | swap the red channel with the blue channel | mix up the colour
channels | make everything red blue and everything blue red | shuffle the colour channels | exchange
the channels | rotate the channels | interchange the colour channels | change all reds to blues and
vice versa | reorder the channels
""",
        "phrase": """
red and blue swapped | bgr | rgb to bgr | channel swap | red-blue swap | red becomes blue and blue
becomes red | swapped channels | blue instead of red and red instead of blue | red to blue and blue
to red | channels swapped | exchanged channels | colours swapped | red for blue, blue for red | red
<-> blue | r <-> b | red and blue exchanged | red and blue reversed | what was red should be blue
and vice versa | bgr instead of rgb | colour swap | swap channels | red and blue in each other's
place | wrong channel order | exchange red and blue | switch red and blue | swap red and blue please
| red and blue switched | reds and blues swapped | blue and red swapped | blue-red swap | channel
exchange
""",
    },
    "autumn": {
        "adj": """
autumnal | autumnal | autumn-like | fall-coloured | autumn-coloured | october-like | autumn |
fall-like | autumn-toned | leaf-brown and golden | russet | harvest-like | fall-themed | autumny |
rusty and leafy | november-like | fallish
""",
        "noun": """
autumn | an autumn scene | fall | autumn colours | fall colours | an autumn day | a fall scene |
indian summer | fall foliage | october | the fall season | autumn tones | november | autumn leaves |
a harvest scene | the autumn season | an autumn landscape | fall time | autumn time | a fall
landscape | rusty foliage
""",
        "fx": """
autumn colours | fall colours | an autumn {look} | autumn tones | an autumn filter | fall foliage |
fall tones | an autumn effect | a fall filter | autumn foliage | rusty leaves | a fall {look} |
autumn leaves | rust-coloured foliage | harvest colours | an october mood | indian summer colours |
russet tones | a fall mood | autumn hues | golden leaves
""",
        "verb": "autumnize | give autumn colours to | bring autumn to | make autumnal | add autumn to | give fall colours to",
        "act": """
change the season to autumn | change the season to fall | change to autumn | change to fall | make
it autumn | make it fall | make it look like autumn | make it look like fall | turn summer into
autumn | turn the leaves orange | turn the foliage rusty | set the season to autumn | let autumn
come | make all leaves brown | switch the season to fall | let the leaves turn brown | turn the
green into rust | turn green leaves to orange ones | change summer to fall | make the leaves golden
| switch the season to autumn | make it feel like autumn | make it feel like october | paint {obj}
in autumn colours | color the leaves like fall | move {obj} to october | bring on the autumn
""",
        "like": """
autumn | fall | an autumn day | october | an indian summer | it was taken in autumn | a fall day in
vermont | a forest in october | the leaves are falling | harvest time | a november day | it is
thanksgiving | an autumn forest | new england in the fall | halloween season
""",
        "phrase": """
autumn | in autumn | in the fall | fall season | autumn mood | leaves turning brown | season: autumn
| season: fall | autumn vibes | october mood | fall colours | the leaves turn | falling leaves mood
| indian summer | when the leaves fall | autumn please | harvest season | fall is here | autumn has
come | autumn foliage | fall vibes | fall foliage | thanksgiving mood | pumpkin season | sweater
weather | late october | the leaves change colour
""",
    },
    "blur": {
        "adj": """
blurry | blurry | blurred | out of focus | unfocused | out-of-focus | defocused | soft-focus |
unsharp | indistinct | fuzzy | smeared | bleary | smudged | smudgy | gaussian-blurred | without
sharpness | soft focused | softly blurred | smooth and soft | vague | dreamily soft | not sharp |
ill-defined | blurry and soft | focusless | soft and blurry | heavily blurred | slightly blurred |
lightly blurred | blur-filled | lacking focus
""",
        "cmp": """
blurrier | softer | less sharp | fuzzier | more blurry | more blurred | less focused | smoother |
less crisp | more out of focus | not so sharp | less clear | vaguer | more unfocused | blearier |
smudgier | more indistinct
""",
        "noun": """
a blur | a blurry {pic} | a blurred {pic} | soft focus | a blurred version | an out-of-focus {pic} |
a soft-focus {pic} | a defocused {pic} | gaussian blur | a fuzzy {pic}
""",
        "fx": """
blur | a blur | a blur effect | gaussian blur | a gaussian blur | soft focus | a soft focus effect |
some blur | a blur filter | blurriness | a smoothing filter | a softening effect | lens blur | a lot
of blur | bokeh everywhere | softness | a low-pass filter | a slight blur | a defocus effect |
fuzziness | a box blur | a soft lens | vaseline on the lens | a smear | blurring | an unfocused
{look} | smoothing
""",
        "verb": """
blur | blur | soften | defocus | smudge | unfocus | smear | blur out | smooth | unsharpen | gaussian
blur | reduce the sharpness of | decrease the sharpness of | lower the sharpness of | take the
sharpness out of | remove the focus from | smooth out | remove the sharpness from | fuzz | throw out
of focus | put out of focus | blear
""",
        "act": """
apply a blur | apply gaussian blur | blur everything | make everything blurry | put {obj} out of
focus | throw {obj} out of focus | reduce the sharpness | take away the sharpness | soften the
details | soften all edges | smear the details | lose the focus | lower the sharpness | make it look
like i lost my glasses | smooth the details | blur all details | blur the {whole} {pic} | blur the
{whole} {pic} | smooth out the details | unfocus the lens | defocus the lens | soften the focus |
miss the focus | remove the fine details | make the outlines fuzzy | let the details melt | shake
the camera
""",
        "like": """
it is out of focus | a view through frosted glass | an out-of-focus shot | a blurry photo | a view
without glasses | soft focus photography | frosted glass | an unfocused lens | a shaky photo | seen
by a short-sighted person | a badly focused shot | a dream sequence | a blurred photo | a blurry
memory | an unfocused photo | a view through a dirty window | a photo with a soft lens | something
out of focus | a blur | a photo out of focus
""",
        "phrase": """
blur | blurred | out of focus | too sharp | {obj} is too sharp | soft focus | blur effect | less
sharp | gaussian blur | without glasses | behind frosted glass | blurry | everything blurred |
sharpness down | soft and blurry | like without my glasses | full blur | fuzzy | nothing should be
sharp | blur please | no focus | bokeh blur everywhere | softness | details should not be
recognisable | lost focus | the whole picture out of focus | unsharp | shortsighted view | smudged |
blurring | blurriness | blurry please | a blur | unfocused | defocused | softness please | too crisp
| too sharp and clear | it should be blurry | blurred vision | a soft blur | out-of-focus | softly
blurred | unsharpness | lose sharpness | less sharpness | less focus | less detail | lower sharpness
""",
    },
    "sketch": {
        "adj": """
hand-drawn | pencil-drawn | sketched | sketchy | drawn in pencil | like a pencil drawing | pencilled
| hand-sketched | sketch-like | drawn by hand | penciled | hatched in graphite | drawn in graphite |
drawn with charcoal | crayon-drawn | line-drawn
""",
        "noun": """
a pencil sketch | a sketch | a drawing | a pencil drawing | a hand drawing | a line drawing | a
graphite drawing | a charcoal drawing | a hand-drawn sketch | a rough sketch | line art | pencil art
| a doodle drawing | a charcoal sketch | pencil strokes | a graphite sketch | a pen drawing | an ink
drawing | a scribble | a croquis | a black pencil drawing | a chalk drawing | a crayon drawing | a
draft in pencil | sketch style | pencil on paper
""",
        "fx": """
a pencil sketch effect | a sketch filter | a sketch effect | pencil strokes | a pencil effect | a
drawing effect | a pencil filter | a hand-drawn {look} | graphite lines | pencil lines | a charcoal
effect | sketch lines | hatching | a graphite {look} | a drawn {look} | a sketchbook {look} | pencil
shading
""",
        "verb": """
sketch | draw | pencil | sketch out | hand-draw | draw the outlines of | make a sketch of | make a
drawing of | doodle | pencil-sketch | redraw | scribble | make a pencil drawing of
""",
        "act": """
draw {obj} with a pencil | draw {obj} in pencil | draw {obj} by hand | sketch {obj} in pencil |
sketch {obj} on paper | turn {obj} into pencil lines | make it a pencil drawing | redraw {obj} as a
sketch | put {obj} on paper with a pencil | draw {obj} with graphite | draw {obj} with charcoal |
scribble {obj} with a pencil | trace {obj} with a pencil | draw {obj} in a sketchbook | outline
{obj} in pencil | draw {obj} on white paper | sketch {obj} with charcoal | draw {obj} with a pen |
use pencil strokes only | draw it like an artist with a pencil | hatch {obj} with a pencil
""",
        "like": """
a pencil drawing | a pencil sketch | a drawing by hand | it was drawn with a pencil | a page in a
sketchbook | a da vinci drawing | an artist's sketch | a graphite study | a charcoal sketch | a
drawing on paper | a student's pencil drawing | a drawing by a street artist | a durer drawing | an
architect's drawing | a courtroom sketch | a doodle in a notebook | an a-ha take on me video
""",
        "phrase": """
pencil sketch | sketch | drawing | pencil drawing | hand drawn | pencil | drawn on paper | in pencil
| sketchbook style | sketch style | pencil art | line art | charcoal | graphite on paper | only
pencil lines | drawn with a pencil | a few pencil strokes | pencil strokes on white paper | charcoal
drawing | a quick sketch | hand-drawn style | graphite | scribbled | drawing style | pencil on paper
| black lines on white paper | an artist's sketch
""",
    },
    "thermal": {
        "adj": """
thermal | infrared | heat-mapped | thermographic | heat-vision | heat-coloured | thermally imaged |
infra-red | heat-sensing | thermal-imaged | ir-like | false-coloured by heat
""",
        "noun": """
a thermal image | a heat map | a heatmap | infrared | thermal vision | heat vision | a thermogram |
an infrared image | a thermal {pic} | thermal colours | a thermographic image | thermal imaging |
thermal view | an infrared {pic} | heat signature colours | a thermal scan | flir | ir mode | a
temperature map | an infrared scan | thermography | a heat image | a heat picture | heat colours | a
heat scan | a heat view | an infra-red image | body heat colours | thermovision
""",
        "fx": """
a thermal effect | a heat map | a heatmap effect | thermal vision | a thermal filter | heat vision |
a thermal camera effect | an infrared filter | an infrared effect | thermal colours | a heat map
overlay | heat colours | a thermal camera {look} | a temperature map | a thermography effect |
infrared vision | a thermal imaging effect | a heat signature
""",
        "verb": "heat-map | thermally image | make a heat map of | make a thermal image of | scan the heat of | heatmap | show the heat of",
        "act": """
show {obj} as seen by a thermal camera | show the heat | show the temperature | view {obj} in
infrared | view {obj} with a thermal camera | map brightness to heat colours | make {obj} a heat map
| show {obj} as a heat map | show {obj} through a thermal camera | scan {obj} with infrared |
visualise the heat | visualise the temperatures | switch to thermal view | show me the heat
signature | turn on thermal vision | look at {obj} with heat vision | simulate a thermal camera |
turn on infrared | use thermal imaging | display the temperatures | film it with an infrared camera
| reveal the heat signature | make the heat visible
""",
        "like": """
a thermal camera | a heat map | a thermal image | predator vision | an infrared camera | it was
taken with a thermal camera | the predator's view | a thermographic camera | a flir camera | a
thermal scan | a building's heat loss image | an infrared scan | a snake's vision
""",
        "phrase": """
thermal | heat map | infrared | thermal camera | heatmap | heat vision | predator vision | thermal
vision | thermography | flir | thermal imaging | as seen by a heat camera | heat signature |
temperature colours | infrared camera | hot red and cold blue by heat | thermal image | false colour
heat | ir camera | body heat view | thermal view | temperature map | thermogram | infrared goggles |
heat sensor view | warmth visible as colours | heat | heat view | heat image | heat scan | heat
camera | body heat | thermal scan | thermal photo | infra-red | infrared view | thermal colours |
heat colours | heat picture | heat sensing | thermal heat map | temperature view | thermographic
""",
    },
    "cyberpunk": {
        "adj": """
cyberpunk | cyberpunk | neon | futuristic | neon-lit | sci-fi | synthwave | vaporwave | dystopian |
neon-coloured | cyber | retrowave | blade-runner-like | neon-soaked | techno-futuristic | cybernetic
| outrun | neon-drenched | duotone neon | high-tech | tron-like | techno
""",
        "noun": """
cyberpunk | a cyberpunk scene | a neon city | synthwave | a cyberpunk city | vaporwave | a sci-fi
scene | neon colours | a neon dream | a dystopia | the future | a neon scene | neon pink and cyan |
cyberpunk art | retrowave | magenta and cyan | a blade runner scene | night city neon | a hacker's
dream | a futuristic world
""",
        "fx": """
neon lights | neon light | a cyberpunk effect | a cyberpunk filter | neon colours | a neon glow | a
synthwave {look} | a cyberpunk {look} | neon lighting | magenta and cyan light | pink and cyan neon
| a sci-fi {look} | a vaporwave filter | a neon effect | a futuristic {look} | holographic light | a
blade runner mood | glowing neon | retrowave colours | laser light | a cyan and magenta duotone | a
dystopian mood | neon signs glow | a neon duotone
""",
        "verb": "cyberpunk | neonize | cyberpunkify | neon up | cyberize | futurize | give a cyberpunk style to",
        "act": """
make it cyberpunk | move {obj} to night city | bathe {obj} in neon light | light {obj} with neon |
put {obj} in a neon city | make it look like blade runner | send {obj} to the future | set {obj} in
2077 | move {obj} to a sci-fi world | colour {obj} in magenta and cyan | grade {obj} in magenta and
cyan | drench {obj} in neon | transport {obj} to a dystopian future | illuminate {obj} with neon
signs | flood {obj} with neon | make {obj} glow with neon | give {obj} a cyberpunk style
""",
        "like": """
blade runner | cyberpunk 2077 | a cyberpunk game | a neon city | a scene from blade runner | tron |
a sci-fi movie | neo tokyo | ghost in the shell | a synthwave album cover | a futuristic city | a
video game in neon | a dystopian film | an arcade from the 80s | a neon sign | a rave | akira | a
hacker movie | a robot future
""",
        "phrase": """
cyberpunk | cyberpunk style | neon | neon lights | cyberpunk 2077 | blade runner style | synthwave |
vaporwave | neon city | futuristic | sci-fi neon | neon pink and blue | retrowave style | neo tokyo
| high tech low life | cyberpunk city at its best | neon vibes | magenta and cyan duotone | outrun
style | night city | dystopian future | cyberpunk mood | neon noir | in the year 2077 | glowing neon
signs | tron style | futuristic neon glow | cyber | cyber style | neon colours | neon glow | neon
light | cyber city | cyber neon | futuristic neon | sci-fi | sci-fi style | future city | synth |
neon sci-fi | cyberpunk neon
""",
    },
    "stencil": {
        "adj": """
stencil-like | stencilled | thresholded | binary | two-tone | two-coloured black and white |
posterised to two tones | banksy-like | 1-bit | one-bit | bitonal | silhouette-like | pure black and
pure white | cut-out | spray-stencilled | linocut-like | bilevel | binarised | woodcut-like |
stamp-like | silhouetted | binary black and white | hard black and white | stencil-style |
stencil-printed | cut out of paper | two-coloured
""",
        "noun": """
a stencil | stencil art | a threshold image | a stencil print | a silhouette | a linocut | a black
and white stencil | a paper cut | a binary image | two tones | a spray stencil | a banksy stencil |
a rubber stamp | a woodcut | a 1-bit image | street art stencil | a graffiti stencil | a two-tone
poster | a papercut | a screen print in black | a stamp print | a cut-out
""",
        "fx": """
a stencil effect | a threshold | a stencil filter | a threshold filter | a threshold effect | a
two-tone effect | a stencil {look} | hard black and white | a linocut effect | a stamp effect | a
woodcut effect | a paper cut effect | a silhouette effect | binarisation | a photocopy threshold | a
banksy {look}
""",
        "verb": """
stencil | threshold | binarise | make a stencil of | cut a stencil of | turn to pure black and white
| make a silhouette of | make a linocut of | stamp | make a woodcut of | reduce to two tones
""",
        "act": """
reduce {obj} to two tones | use only pure black and pure white | apply a threshold | spray {obj}
through a stencil | make a stencil | make it look like a stencil | cut {obj} out of black paper |
make {obj} a banksy stencil | turn {obj} into a stencil | make {obj} 1-bit | reduce {obj} to black
shapes | use only two colours, black and white | carve {obj} into lino | cut {obj} out of paper |
threshold at 50 percent | turn {obj} into black shapes on white | set each pixel to black or white |
binarise the pixels | print {obj} as a linocut | remove all halftones | make each pixel either black
or white
""",
        "like": """
a stencil | a banksy | a stencil graffiti | a linocut | a spray stencil | a paper cut-out | a che
guevara poster | a rubber stamp | a woodcut | a banksy on the wall | a black paper cutting | a
t-shirt print in one colour | a bad photocopy | a propaganda poster in black | a silhouette picture
| a screen-printed t-shirt
""",
        "phrase": """
stencil | stencil art | threshold | banksy style | two-tone | stencil style | pure black and white
without grey | only black or white, no grey | hard threshold | stencil graffiti | 1-bit | silhouette
| linocut | no grey tones in between | graffiti stencil | black shapes only | two tones only |
woodcut style | street art | 1 bit black and white | spray-paint stencil | cut-out style | papercut
style | rubber stamp | binary | no halftones | just two tones | stencilled | stencil print |
thresholding | thresholded | only black and white areas | hard edges in black and white | black or
white only | binary black and white | two colours only | silhouettes | stencil print | stencil
poster | cut out of black paper | two-colour black and white | binarise | pure black on pure white
""",
    },
    "mosaic": {
        "adj": """
pixelated | pixelated | pixellated | mosaic | blocky | tiled | 8-bit | pixelised | low-res |
mosaic-like | coarse | chunky | censored | made of squares | low-resolution | minecraft-like |
checkered in blocks | 16-bit | tessellated | pixelly | made of tiles | lego-like | patchwork-like
""",
        "noun": """
a mosaic | pixel art | pixels | a pixelated {pic} | big pixels | coloured tiles | a tile mosaic |
mosaic tiles | 8-bit | an 8-bit game | pixel blocks | blocks | squares | large pixels | a roman
mosaic | a mosaic of squares | a lego picture | coloured blocks | a patchwork of squares | low
resolution | 8-bit graphics
""",
        "fx": """
a mosaic effect | pixelation | a mosaic filter | a pixel effect | a pixelate filter | big pixels |
mosaic | mosaic tiles | a censor effect | tiles | a blocky {look} | an 8-bit {look} | a pixel filter
| a pixel art effect | coarse pixels | pixel blocks | a censorship mosaic | a tile effect |
pixelization | a minecraft {look} | large square blocks
""",
        "verb": """
pixelate | pixelate | pixelise | mosaic | tile | pixellate | censor | make a mosaic of | turn to
pixels | tessellate | downsample | break up into squares | mosaicise | reduce the resolution of
""",
        "act": """
pixelate {obj} | pixelate everything | divide {obj} into squares | break {obj} into tiles | make the
pixels huge | show big pixels | turn {obj} into pixel blocks | build {obj} out of tiles | make {obj}
out of small squares | lower the resolution | lay {obj} as a mosaic | make the pixels visible |
censor {obj} with a mosaic | build {obj} from lego bricks | assemble {obj} from tiles | make the
pixels bigger | compose {obj} of coloured squares | use large square pixels | reduce the resolution
| make {obj} blocky | enlarge the pixels | apply a mosaic | cut {obj} into squares | render {obj} in
8 bit | turn {obj} into coloured tiles
""",
        "like": """
a mosaic | pixel art | an 8-bit game | minecraft | a roman mosaic | a censored photo | a retro video
game | a game boy game | lego bricks | a tile floor | bathroom tiles | a pompeii mosaic | an old
computer game | stained tiles | a nintendo game | coloured bricks | a patchwork quilt | a low
resolution image | a byzantine mosaic
""",
        "phrase": """
mosaic | pixelated | pixel art | pixelate | 8-bit | big pixels | mosaic effect | tiles | low
resolution blocks | 8 bit style | pixel style | mosaic style | censored | blocky | minecraft style |
made of squares | small tiles | retro game pixels | huge pixels | coarse pixels | lego style |
coloured squares | like a tiled wall | nintendo style | made of little tiles | square blocks |
pixelation | pixels
""",
    },
    "painting": {
        "adj": """
painted | painterly | oil-painted | impressionist | impressionistic | artistic | like an oil
painting | brushed | hand-painted | watercolour-like | posterised | painted in oil | painted with a
brush | baroque-style painted | van-gogh-like | acrylic | gouache-like | painting-like |
expressionist | painted on canvas
""",
        "noun": """
a painting | an oil painting | a watercolour | a watercolour painting | an acrylic painting | an
artwork in oil | a canvas | an impressionist painting | a gouache | a hand-painted picture | a
painted {pic} | an aquarelle | oil on canvas | a fresco | a tempera painting | a masterpiece in oil
| a painted canvas | a posterised {pic} | fine art | a museum painting | a renaissance painting | an
expressionist painting
""",
        "fx": """
a painting effect | an oil paint effect | brush strokes | brushstrokes | a painting filter | an oil
painting filter | a watercolour effect | a painterly {look} | a posterise effect | a canvas effect |
thick paint | posterisation | a watercolour filter | visible brush strokes | an oil paint filter |
an impressionist touch | a brush effect | palette knife strokes | dabs of paint | oil colours |
impasto | a painted {look}
""",
        "verb": """
posterise | paint | turn to a painting | make a painting of | make an oil painting of | repaint |
oil-paint | brush | hand-paint | make a watercolour of | make a canvas of | paint over
""",
        "act": """
paint {obj} | paint {obj} in oil | paint {obj} with a brush | paint {obj} with thick brush strokes |
paint {obj} on canvas | paint {obj} like van gogh | paint {obj} like monet | put {obj} on canvas |
redo {obj} with oil paint | make brush strokes visible | paint {obj} in watercolour | reduce the
number of colours | paint {obj} in acrylic | render {obj} with oil colours | paint {obj} like an old
master | paint {obj} like rembrandt | paint {obj} like cezanne | use broad brush strokes | turn the
photo into a painting | make it a painting | make art out of {obj} | paint {obj} as an impressionist
would | put paint on {obj} with a palette knife
""",
        "like": """
an oil painting | a painting | a van gogh | a monet | a watercolour | a painting by van gogh | it
was painted | an impressionist painting | a rembrandt | an old master | a canvas in a museum | a
picture painted by hand | a painting by monet | a cezanne | a renoir | an expressionist painting | a
turner | a museum piece in oil | an aquarelle | a renaissance fresco | a vermeer | a gallery
painting | a picture painted with a brush | a hand-painted picture | a painted picture | an
impressionist canvas | paint on canvas | an acrylic painting | a gouache painting
""",
        "phrase": """
painting | oil painting | painted | watercolour | van gogh style | brush strokes | oil on canvas |
painting style | in oil | impressionism | painterly | artistic painting | monet style | hand painted
| like a painting | posterise | paint style | as a painter would see it | acrylic on canvas | broad
brush strokes | painted by an old master | aquarelle | thick oil paint | on canvas | van gogh |
rembrandt style | gouache | fine art painting | a work of art on canvas | posterised colours | paint
| painted in oil | oil paint | oils | painted canvas | a painting | an oil painting | impressionist
| impressionistic | painted by hand | painting effect | with a brush | brush painting | artist paint
| paint on canvas | painted with brush strokes | impressionist style
""",
    },
}

UNKNOWN = {
    # objects and object edits
    "act": """
add a hat | add a red hat | add sunglasses | {put} {thing} | {put} {thing} | {put} {thing} | {put}
{thing} {where} | {put} {thing} {where} | {put} {thing} to {obj} | {put} {wear} | {put} {wear} |
{put} {wear} to {who} | {put} {wear} on {who} | {put} {colour} {wear0} on {who} | put {wear} on
{who} | give {who} {wear} | give {who} {colour} {hair} | make {who} wear {wear} | {put} {count}
{things} | {put} {count} {things} {where} | {put} a {colour} {thing0} | {put} a {colour} {thing0} |
{put} a {colour} {thing0} {where} | {put} a {colour} {wear0} | {put} a {colour} {wear0} | put
{thing} {where} | put {thing} {where} | put a {colour} {thing0} {where} | {remove} the {thing0} |
{remove} the {thing0} | {remove} the {things} | {remove} the {colour} {thing0} | {remove} {who} |
{remove} the {wear0} | {remove} the {part} | {remove} the {thing0} {where} | {remove} the {junk} |
{remove} the {junk} from {obj} | {remove} the {thing0} from {obj} | {replace} the {thing0} with
{thing} | {replace} the {thing0} with a {colour} {thing0} | {replace} the {thing0} by {thing} |
{replace} {who} with {thing} | {swapin} the {thing0} for {thing} | {turn} the {thing0} into {thing}
| {turn} the {thing0} into {thing} | {turn} {who} into {thing} | {turn} {who} into a {role} | make
{who} {act0} | make {who} {act0} | make {who} {act0} | make {who} look {feeling} | make {who}
{feeling} | make {who} a {role} | {paintit} the {thing0} {colour} | {paintit} the {part} {colour} |
{paintit} the {wear0} {colour} | {paintit} the {place} {colour} | make the {thing0} {colour} | make
the {part} {colour} | make the {wear0} {colour} | make the {part} {colour} | turn the {thing0}
{colour} | turn the {part} {colour} | turn the {wear0} {colour} | {change} the {part} to {colour} |
{change} the {thing0} to {colour} | {change} the colour of the {thing0} to {colour} | {change} the
colour of the {part} to {colour} | {change} the {thing0} colour to {colour} | change {hair0} colour
to {colour} | make {his} {body} {colour} | make {his} {hair0} {colour} | dye {his} {hair0} {colour}
| {change} the {text} to {word} | {change} the {text} to {word} | {change} the {text} to say {word}
| {replace} the {text} with {word} | write {word} {where} | {put} the {text} {word} | {remove} the
{text} | {replace} {word} with {word} | translate the {text} to {tongue} | {change} the background
to {scene} | {change} the background to {scene} | {replace} the background with {scene} | {change}
the background to {colour} | {replace} the background | {remove} the background | make the
background {colour} | put {who} in {scene} | move {who} to {scene} | place {obj} in {scene} | set
the scene in {scene} | make the {thing0} {size} | make the {part} {size} | make {his} {body} {size}
| make {who} {size} | move the {thing0} {dirn} | turn {who} {dirn} | {local} the background |
{local} the {part} | {local} the {thing0} | {local} {his} {body} | {local} {who} | {local} only the
{thing0} | {local} just the {part} | make the {part} {edit_adj} | make the {thing0} {edit_adj} |
make the {thing0} {edit_adj} | make only the {thing0} {edit_adj} | make {his} {body} {edit_adj} |
make {his} {wear0} {edit_adj} | make the background {edit_adj} | make {who} {edit_adj} | make the
{part} {edit_cmp} | make the {thing0} {edit_cmp} | give the {thing0} a {colour} {coat} | give the
{thing0} {fur} | {op} | {op} | {op} | {op} {obj} | {op} {obj} | {op} {obj} | {opp} | {opp} | {opp} |
{op} the {thing0} | {turn} {obj} into {style0} | {turn} {obj} into {style0} | make {obj} {style0} |
make {obj} look like {style0} | {undo} {stuff} | {undo} {stuff} | {undo} {stuff} | make {obj}
{othercolour} | {put} a {othercolour} tint | turn {obj} {othercolour} | tint {obj} {othercolour} | a
{othercolour} filter | draw {thing} {where} | draw {thing} | paint {thing} {where} | let {who} hold
{thing} | let {who} {act0} | let it {weather} | make it {weather} | {put} {weathern} | generate
{thing} | generate a {pic} of {thing} | show {thing} | create a {pic} of {thing} {where} | {change}
the season to {season} | make it {season} | open {his} {eyes} | close {his} {eyes} | {change} {his}
{body} | {change} {his} {hair0} | {change} {his} {wear0} | {change} his {wear0} to {wear} | dress
{who} in {wear} | dress {who} as a {role} | {change} the {thing0} | {change} {who} | fix {his}
{body} | fix the {thing0} | hide the {thing0} | cover the {thing0} with {thing} | fill the {part}
with {things}
""",
    "phrase": """
{hello} | {hello} | {question} | {question} | {question} | {nonsense} | {nonsense} | {nonsense} |
{random} {random} | {random} {random} {random} | {random} | {thing0} | {thing0} | {wear0} | {wears}
| {thing} {where} | {thing} and {thing} | a {colour} {thing0} {where} | a {colour} {thing0} | a
{role} in a {colour} {wear0} | a {role} with {thing} | {who} in {scene} | {colour} {thing0} |
{colour} {wear0} | {colour} {hair} | {colour} {things} | {style0} | {style0} style | in {style0}
style | {style0} please | {wear} | {wear} please | i want {thing} {where} | i want {wear} on {who} |
i'd like {thing} {where} | i'd like a {colour} {thing0} | there should be {thing} {where} | {who}
should {act0} | {who} should wear {wear} | the {thing0} should be {colour} | the {part} should be
{colour} | the {thing0} must go | without the {thing0} | no {things} | no {thing0} | {thing} instead
of the {thing0} | where is the {thing0} | the {text} should say {word} | {who} is {feeling} | {who}
looks {feeling} | {othercolour} | {scene} | {scene} as background | {colour} background | {season} |
{weathern} | i need {wear} | the {part} is too {edit_adj} | the {thing0} should be {edit_cmp} |
{thing} | {things} | {count} {things} | more {things} | {word} | {op} | {opp} | {opp} | a {pic} of
{thing} | a {pic} of a {colour} {thing0} | a {size} {thing0} | {who} {where} | {othercolour} tint
""",
    "put": "add | add | add | add | put in | insert | include | place | draw | attach | generate | create | bring in | introduce | paste | photoshop in | append",
    "remove": """
remove | remove | remove | delete | erase | get rid of | take away | eliminate | cut out | wipe out
| take out | clean up | hide | drop | clear | exclude | crop out | discard | throw out
""",
    "replace": "replace | replace | substitute | exchange | swap out | switch",
    "swapin": "swap | trade | exchange | switch",
    "change": "change | change | change | switch | set | alter | edit | modify",
    "paintit": "paint | paint | colour | color | dye | tint | spray | recolour | make | turn | varnish",
    "local": """
blur | darken | brighten | lighten | sharpen | invert | pixelate | desaturate | recolour | tint |
warm up | soften | censor | sketch | dim | light up | saturate | fade | cool down
""",
    "where": """
on the table | on the left | on the right | in the background | in the foreground | next to him |
next to her | in the sky | on the wall | on his head | on her head | in the corner | on the grass |
in his hand | in her hand | beside the tree | behind the house | in the middle | under the table |
on the street | on top | at the bottom | in the water | on the shelf | near the window | in the room
| to the scene | in front of the door | on the floor | on the roof | by the river | in the centre |
on the bench | above the horizon | between them | over the lake | at the top | inside the box |
along the road | around the neck
""",
    "who": """
him | her | them | the man | the woman | the girl | the boy | the person | the dog | the cat | me |
the child | the baby | the people | the lady | the guy | the people | the kid | the bride | my
friend | the old man | the model | my mother | the player | the guest | the teacher | my brother |
the couple
""",
    "his": "his | her | the | their | my | the man's | the woman's | the girl's | the dog's | the cat's | the boy's",
    "thing": "a {thing0} | a {thing0} | a {thing0} | a {size} {thing0} | the {thing0} | another {thing0} | some {things} | one {thing0}",
    "thing0": """
dog | cat | bird | tree | car | house | flower | ball | chair | table | lamp | moon | sun | cloud |
rainbow | boat | ship | bicycle | horse | cow | sheep | fish | butterfly | balloon | kite | book |
cup | bottle | cake | apple | banana | pizza | sandwich | phone | laptop | computer | guitar | piano
| camera | clock | sign | fence | bridge | mountain | river | lake | castle | tower | church | bench
| umbrella | bag | suitcase | robot | dragon | unicorn | dinosaur | alien | ghost | spaceship | ufo
| rocket | plane | airplane | train | bus | truck | motorcycle | helicopter | elephant | lion |
tiger | bear | rabbit | monkey | panda | penguin | giraffe | zebra | fox | wolf | snake | spider |
bee | duck | chicken | owl | eagle | parrot | swan | whale | shark | dolphin | turtle | frog | mouse
| squirrel | snowman | pumpkin | candle | mirror | window | door | sofa | bed | pillow | carpet |
vase | plant | rose | tulip | sunflower | cactus | mushroom | fountain | statue | flag | poster |
person | man | woman | child | crowd | soldier | knife | fork | spoon | plate | glass | wine glass |
coffee cup | teapot | toy | teddy bear | doll | football | skateboard | surfboard | tent | campfire
| lighthouse | windmill | traffic light | street lamp | star | planet | island | waterfall | beach
ball | palm tree | kitten | puppy | pony | goat | pig | donkey | camel | kangaroo | koala | hamster
| logo | watermark | painting on the wall | picture frame | tv | fridge | stove | sink | bathtub |
ladder | box | basket | bucket | broom | hammer | sword | shield | gun | crown | wand | drone |
orange | lemon | strawberry | cherry | grape bunch | carrot | tomato | burger | donut | ice cream |
birthday cake | gift | christmas tree | firework | snowflake | sandcastle | seagull | crab | octopus
| jellyfish | rock | stone | cave | volcano | tunnel | pier | tram | scooter | van | tractor |
helmet stand | drum | violin | trumpet | microphone
""",
    "things": """
flowers | trees | birds | clouds | people | stars | balloons | butterflies | cars | dogs | cats |
houses | mountains | apples | books | candles | fireworks | bubbles | leaves on the ground |
raindrops | snowflakes | fish | hearts | roses | boats | tourists | windows | wires | power lines |
shadows of people | cows | horses | sheep | bees | stickers | chairs | lanterns | toys | mushrooms |
ducks | sunflowers | robots | planets | letters | arrows | wings | pedestrians | cables | pigeons
""",
    "wear": "a {wear0} | a {wear0} | a {wear0} | a {colour} {wear0} | {wears} | {wears} | {colour} {wears} | a pair of {wears}",
    "wear0": """
hat | hat | cap | scarf | tie | dress | shirt | jacket | coat | suit | skirt | sweater | t-shirt |
beard | mustache | necklace | crown | helmet | mask | wig | backpack | ring | watch | veil | cape |
uniform | bow tie | hoodie | beanie | cowboy hat | top hat | santa hat | straw hat | baseball cap |
bracelet | belt | blouse | kimono | apron | swimsuit | hijab | turban | tattoo | moustache |
headband | badge | monocle | raincoat | tuxedo | wedding dress | kilt | vest
""",
    "wears": """
sunglasses | sunglasses | glasses | gloves | earrings | boots | shoes | headphones | jeans | shorts
| sneakers | socks | pants | trousers | wings | horns | pyjamas | freckles | braces | dreadlocks |
sandals | high heels | goggles | mittens | bunny ears
""",
    "colour": """
red | red | blue | green | yellow | pink | purple | orange | black | white | brown | golden | silver
| gray | grey | dark | bright | violet | crimson | turquoise | beige | pale | dark blue | light
green | bright red | scarlet | lavender | navy | teal | cyan | magenta | colourful |
rainbow-coloured | neon | emerald | olive | lilac | maroon | indigo | rosy
""",
    "othercolour": "yellow | turquoise | teal | cyan | white | black | beige | rainbow | transparent | lemon yellow | mustard | khaki | ivory | silver",
    "hair": "hair | eyes | skin | lips | nails | eyebrows | curls | bangs",
    "hair0": "hair | hair | hair | beard | eyebrows | ponytail | hairstyle | haircut",
    "body": "face | eyes | hair | nose | mouth | skin | smile | teeth | ears | legs | arms | lips | hands | head | chin | cheeks | belly | shoulders | expression | pose",
    "eyes": "eyes | mouth | left eye | hand",
    "part": """
sky | background | foreground | wall | floor | grass | water | sea | ceiling | roof | door | road |
ground | clouds | hair | eyes | face | shirt | dress | sofa | curtain | left side | right side |
corner | window | leaves | lawn | mountains | river | hat | shoes | lips | ocean | sand | street |
fur | skin | car | house | flowers | building
""",
    "place": "room | kitchen | garden | street | house | building | bathroom | bedroom | balcony",
    "junk": """
person in the background | people | text | watermark | logo | background | shadow | shadows |
wrinkles | reflection | noise | scratches | glasses | acne | stain | date stamp | cable | crowd |
tourists | pimples | dirt | dust | trash | frame | border | fence | wires | car in the background |
man on the left | double chin | dark circles | glare | objects | clutter
""",
    "role": """
pirate | superhero | princess | king | queen | zombie | vampire | clown | astronaut | knight |
wizard | witch | robot | ninja | cowboy | doctor | mermaid | santa claus | policeman | baby | girl |
boy | man | woman | chef | soldier | nurse | viking | angel | monk | samurai | farmer | model |
mummy | ballerina
""",
    "act0": """
smile | smile | laugh | cry | jump | run | dance | wave | sit down | stand up | sleep | look left |
look at the camera | close the eyes | raise a hand | wink | hold a cup | eat | drink | fly | swim |
kneel | sing | hug the dog | clap | point at the sky | open the mouth | look up | turn around | walk
| shout | read a book | ride a horse | lie down | kiss | frown
""",
    "feeling": "happy | sad | angry | older | younger | surprised | tired | scared | muscular | slim | fat | bald | taller | friendly | serious | handsome | thinner | drunk | stronger | pregnant",
    "size": "big | small | bigger | smaller | huge | tiny | larger | taller | shorter | longer | thinner | wider | giant | little | fluffy | wooden | old | new | broken | round | metal | cute",
    "dirn": "to the left | to the right | up | down | closer | away | to the back | towards the camera | around | sideways | upside down",
    "count": "two | three | four | five | ten | many | some | a few | several | a dozen | a hundred | six",
    "coat": "coat | roof | door | wheel | stripe | pattern | hat | ribbon | collar | sail | label | cover | lid",
    "fur": "wings | fur | wheels | legs | a face | eyes | a roof | a sail | arms | spots | stripes | feathers",
    "text": "text | text | sign | title | caption | words | slogan | label | writing | letters | headline | number plate | name | number",
    "word": """
OPEN | HELLO | SALE | "hello" | "OPEN" | 'sale' | WELCOME | 2025 | "happy birthday" | STOP | "love"
| EXIT | "cafe" | TRAIN | PLANE | "good morning" | "peace" | LONDON | "I love you" | CLOSED | "merry
christmas" | 42 | "free" | PARIS | "bakery" | "museum" | "Step1X"
""",
    "tongue": "english | chinese | japanese | german | french | spanish | korean | italian",
    "scene": """
a beach | the beach | paris | a forest | a jungle | outer space | the moon | a library | a kitchen |
new york | a desert | a city street | a park | an office | a stadium | the eiffel tower | a mountain
top | tokyo | a castle | a spaceship | a studio | the ocean | a garden | a church | a supermarket |
a museum | underwater ruins | a cafe | a meadow | las vegas | a cave | the great wall | a farm | a
hospital | an airport | a swimming pool | a classroom | venice | a bridge | a train station
""",
    "season": "spring | summer | rainy season | easter | springtime | summertime",
    "weather": "rain | snow heavily with flakes | storm | hail | thunder | rain cats and dogs | drizzle",
    "weathern": "rain | lightning | a thunderstorm | falling snow | snowflakes | a tornado | raindrops | a storm | a rainbow | clouds | a blue sky | puddles | a flash of lightning",
    "style0": """
a cartoon | cartoon | anime | an anime character | a comic | a comic book | manga | pixar style |
disney | ghibli | studio ghibli | a 3d render | clay | claymation | lego figures | origami | a
statue | a sticker | an emoji | a caricature | a wool doll | a puppet | low poly | a logo | a video
| a gif | a pop art print | cubism | a stained glass window | an embroidery | plasticine | papier
mache | a marble sculpture | a wax figure | a bobblehead | a chibi | a simpsons character | a
hologram figure | a meme | a 3d model | ukiyo-e | an icon | a tattoo design
""",
    "op": """
rotate | crop | sharpen | upscale | resize | flip | mirror | zoom in | zoom out | emboss | denoise |
deblur | straighten | stretch | animate | colorize | restore | relight from the left | unblur |
enlarge | shrink | compress | cut | trim | outpaint | inpaint | extend | segment | caption |
describe | translate | vectorise | duplicate the dog in | undistort | warp | dehaze | retouch |
reframe | uncrop | super-resolve | tilt | print | share | save | delete | scale | skew
""",
    "opp": """
rotate by 90 degrees | rotate left | rotate 180 | crop to a square | crop the top | sharpen the
details | make it sharper | make it sharp | more sharpness | upscale 4x | 4k | hd | 8k ultra hd |
higher resolution | increase the resolution | flip horizontally | mirror it | turn it upside down |
zoom in on the face | edges | edge detection | find the edges | show the outlines only | emboss |
emboss effect | add a border | add a frame | add a vignette | vignette | fisheye lens | add a lens
flare | add film grain | add noise | remove noise | reduce noise | remove the blur | cartoonize |
make it a cartoon | make it anime | wider view | view from above | change the perspective | change
the camera angle | extend the background | make it 3d | depth map | solarize | halftone dots |
glitch effect | add a caption | make a collage | expand the canvas | aspect ratio 16:9 | remove red
eyes | beautify the face | smooth the skin | whiten the teeth | motion blur | double exposure | tilt
shift | swirl | kaleidoscope | ripple effect | add texture | bird's eye view | close-up | panorama |
convert to png | make it square | sepia only on the left half | colorize this old photo | remove the
scratches | restore the old photo | fix the scratches | green screen | swap faces | face swap |
merge both pictures | restore colours to this old photo
""",
    "undo": "remove | remove | get rid of | take away | undo | delete | eliminate",
    "stuff": "the fog | the haze | the mist | the blur | the red tint | the blue cast | the noise | the colour cast | the vignette | the mosaic | the filter | the sepia | the grain | the pixelation",
    "hello": """
hello | hi | hey there | good morning | how are you | thanks | thank you | hello world | bye | good
evening | what's up | nice to meet you | hi there | hello, who are you | goodbye | ok | yes | test |
testing | testing 1 2 3 | good job | well done | sorry | i love you | cool story | never mind | see
you | lol | wow
""",
    "question": """
what is this | who is the {role} | what can you do | where was {obj} taken | how many {things} are
there | what is in {obj} | is there a {thing0} | what colour is the {thing0} | why is the {part}
{colour} | what is the weather today | tell me a joke | who are you | what time is it | can you
describe {obj} | what does the {text} say | which {thing0} is {size} | write a poem | how old is
{who} | is the {thing0} {colour} | what's the name of the {role} | do you like {things} | how does
this work | what is the capital of france | tell me a story | what is 2 + 2 | explain {obj} | who
won | where is {who} | where can i buy a {thing0} | what should i wear | do you know {who} | when
does the train leave | what kind of {thing0} is that | what happened
""",
    "nonsense": "{noise} | {noise} | {noise} {noise} | {noise} {noise} {noise} | {noise}{noise}",
    "random": """
banana | monday | seven | telephone | quickly | democracy | sandwich | river | therefore | purple
elephant | tax | matrix algebra | breakfast | democracy | swimming | because | tomorrow | sugar |
printer | history | physics | cheese | yesterday | marathon | invoice | password | recipe | bank
account | politics | spaghetti | weekend | keyboard | homework | football match | president |
lottery | economy | dentist | chemistry | knitting | harvest festival tickets | email | insurance |
meeting | train ticket | window cleaner | grandmother | philosophy | opera singer | software |
database | kilometre | wednesday | toothbrush | volcano eruption | hypothesis | algebra | shopping
list | passport | airport shuttle | salary | umbrella stand | coconut | potato soup
""",
}
