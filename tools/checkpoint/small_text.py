"""The text that small tokenizers are learned from."""

SMALL_TEXT = """\
What is in this picture? There is a red circle on the left and a blue square on the right of the image.
How many triangles are there? There are three green triangles, two yellow stars and one purple cross.
Describe the image in detail. The photo shows a small brown dog running across a wide field of grass.
Is the cat above or below the table? The cat is below the table, next to a white chair and a black box.
Which colour is the largest shape? The largest shape is orange; the smallest one is grey or pink.
Are these two images different? Yes, the first image has a house with four windows, the second has none.
You are a helpful assistant. Answer the question with one word, a number, or a short sentence.
Please read the text on the sign: STOP, EXIT, OPEN, 0123456789. The sign says that the road is closed today.
The quick brown fox jumps over the lazy dog while the sun goes down behind the mountains near the river.
A woman and a man are walking through the city with their children; the street is busy with cars and buses.
I can see people standing in front of a large building, some of them holding umbrellas because of the rain.
The video begins with an empty room, then a person enters, opens the window and looks outside for a moment.
First the ball moves from left to right, then it stops in the middle, and at the end it falls to the bottom.
What happens after that? Nothing happens until the light turns green and everyone starts to cross the street.
Compare the top half with the bottom half: which contains more objects, and where is the brightest colour?
This chart shows the number of visitors per month between January and December; the highest value is in August.
The table lists name, price, weight and size of every product, together with the date when it was delivered.
Write a short story about a young girl who finds an old camera in her grandmother's house by the sea.
Once upon a time there was a king who had three daughters, and the youngest of them was the most curious.
She looked at the picture again and said: "I don't know who painted it, but I think it's very beautiful."
They've asked whether we'll be there; he's sure that I'm coming, and you'd better bring something to eat.
Would you like some coffee, tea, bread, cheese, apples, bananas or cake? Thank you very much, that is kind.
The model reads the prompt, looks at every image, and writes its answer token by token until it is finished.
{"name": "shape", "value": [1, 2, 3], "type": "object", "items": {"id": 42, "label": "circle", "ok": true}}
def area(width, height):
    return width * height  # the size of a rectangle
for index in range(10):
    print(index, area(index, index + 1))
north south east west inside outside between before after during without because although however therefore
zero one two three four five six seven eight nine ten eleven twelve twenty thirty hundred thousand million
Monday Tuesday Wednesday Thursday Friday Saturday Sunday morning evening night yesterday tomorrow week year
head face eye hand foot heart water fire earth air tree flower bird fish horse train plane ship bridge tower
"""
