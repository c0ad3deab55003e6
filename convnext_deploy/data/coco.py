"""What any COCO file of instances has: `annotations` reads the classes of an image from it, `boxes` its objects too."""

import msgspec


class CocoImage(msgspec.Struct):
    id: int | str
    file_name: str


class CocoCategory(msgspec.Struct):
    id: int
    name: str


class CocoObject(msgspec.Struct):
    image_id: int | str
    category_id: int
